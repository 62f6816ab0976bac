"""Modelled time of one decode step, term by term: every sequence of a batch gets one token.

The kernels are those of a serving engine that replays a CUDA graph: a norm with the add before it, merged QKV, rotary
embedding with the write to the cache, attention over parts of the context and their combination, its output; norm,
merged gate and up, activation, down. All sums of branches are all-reduces among tensor-parallel GPUs.

Constants, and where they come from. They stood before anything was compared with a published latency, and nothing is
fitted to one:

- rates of the hardware: `gpus`; of all-reduces: `links`;
- the share of them that kernels reach, and what it takes to start and drain one: `times.Assumptions`, as they were
  first written for the FFN's kernels. Of a start, 1.3 us are the gap between kernels in a CUDA graph on an H100 (Hazy
  Research, "Look Ma, No Bubbles!", 2025); the rest is memory's latency, to fill the grid and to drain it;
- quantizing to float8 is done by the kernel before a product and costs nothing of its own, as with static scales it can
  (judgement);
- products are as fast as reading their weights or as multiplying at the usual share of the peak, whichever is slower:
  tiles that do not fill the last wave are not counted (judgement);
- a cache of bfloat16, and activations of bfloat16, whatever the weights are (judgement).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from fxfuse.errors import KernelError
from fxfuse.hardware.gpus import Gpu
from fxfuse.hardware.layout import Layout, Shape
from fxfuse.hardware.links import all_reduce
from fxfuse.hardware.times import USUAL, Assumptions

Precision: TypeAlias = Literal["bfloat16", "float8", "float4"]

BYTES: dict[Precision, float] = {"bfloat16": 2.0, "float8": 1.0, "float4": 0.5625}
"""Of a weight. float4 is NVFP4: blocks of 16 with a float8 scale (NVIDIA, "Introducing NVFP4", 2025)."""

ACTIVATION = 2
"""Bytes of a number in activations and in the cache: bfloat16."""


@dataclass(frozen=True)
class Setting:
    """Where and how a model decodes.

    Raises:
        KernelError: a size is below one.
    """

    gpu: Gpu
    tensor_parallel: int = 1
    batch: int = 1
    """Sequences."""
    context: int = 2048
    """Tokens of each sequence in the cache."""
    precision: Precision = "bfloat16"
    assume: Assumptions = USUAL

    def __post_init__(self) -> None:
        if min(self.tensor_parallel, self.batch, self.context) < 1:
            raise KernelError("the number of GPUs, the batch and the context must be at least 1")


@dataclass(frozen=True, slots=True)
class Terms:
    """Seconds of a decode step, by what they go to; and how many kernels and all-reduces there are.

    Attributes:
        weights: reading them, or multiplying with them where that takes longer.
        cache: reading keys and values.
        activations: reading and writing activations.
        launches: starting and draining all kernels but attention's own.
        attention: starting and draining attention's own: rotary embedding, attention, combination.
        all_reduces: adding up between GPUs.
    """

    weights: float = 0.0
    cache: float = 0.0
    activations: float = 0.0
    launches: float = 0.0
    attention: float = 0.0
    all_reduces: float = 0.0
    kernels: int = 0
    reductions: int = 0

    def __add__(self, other: Terms) -> Terms:
        return Terms(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        names = ("weights", "cache", "activations", "launches", "attention", "all_reduces")
        return {name: getattr(self, name) for name in names}

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def step(layout: Layout, setting: Setting) -> Terms:
    """One token for each sequence of the batch.

    Raises:
        KernelError: hidden units, or a vocabulary, that the GPUs cannot divide; or no times for their all-reduces.
    """
    total = _pass(2 * layout.d, setting)  # the embedding
    for part in layout.parts:
        for shape in part.run:
            total += _branch(shape, layout.d, setting)
        total += _reduced(part.streams * layout.d, setting)
    own = _share(layout.vocabulary, "the vocabulary", setting)
    total += _pass(4 * layout.d, setting) + _products(1, layout.d * own, layout.d + own, setting)
    return total + _reduced(own, setting) + _pass(2 * layout.vocabulary, setting)  # gathered, then sampled from


def _branch(shape: Shape, d: int, setting: Setting) -> Terms:
    """A branch on one GPU, without its all-reduce. Rows: what its products make of a token, and read of it again."""
    gpus, norm = setting.tensor_parallel, _pass(4 * d, setting)
    own, rows = shape.weights / gpus, shape.weights / d / gpus
    if shape.kind == "linear":
        return norm + _products(1, own, 2 * d, setting)
    if shape.kind == "ffn":
        _share(shape.width, f"the hidden units of {shape.name}", setting)
        return norm + _products(2, own, 2 * d + rows, setting) + _pass(rows, setting)
    return norm + _products(2, own, 2 * d + rows, setting) + _attend(shape, rows, setting)


def _attend(shape: Shape, rows: float, setting: Setting) -> Terms:
    """Rotary embedding, attention and the combination of its parts; the arithmetic hides behind reading the cache."""
    assume = setting.assume
    held = setting.batch * setting.context * shape.cache / min(setting.tensor_parallel, shape.heads)
    passes = _pass(rows, setting) + _pass(rows, setting)
    return Terms(
        cache=ACTIVATION * held / (setting.gpu.bandwidth * assume.bandwidth),
        activations=passes.activations,
        attention=passes.launches + assume.gemm_launch,
        kernels=3,
    )


def _products(count: int, weights: float, activations: float, setting: Setting) -> Terms:
    """So many products with ``weights`` in all; for each sequence with so many ``activations`` read and written."""
    gpu, assume = setting.gpu, setting.assume
    quarter = setting.precision == "float8" and gpu.quarter_flops
    peak = gpu.quarter_flops if quarter else gpu.half_flops  # float4 weights are widened
    reading = BYTES[setting.precision] * weights / (gpu.bandwidth * assume.bandwidth)
    multiplying = 2 * setting.batch * weights / (peak * assume.flops)
    return Terms(
        weights=max(reading, multiplying),
        activations=_moved(activations, setting),
        launches=count * assume.gemm_launch,
        kernels=count,
    )


def _pass(activations: float, setting: Setting) -> Terms:
    """A kernel that reads and writes so many ``activations`` for each sequence, once."""
    return Terms(activations=_moved(activations, setting), launches=setting.assume.pass_launch, kernels=1)


def _moved(activations: float, setting: Setting) -> float:
    return ACTIVATION * setting.batch * activations / (setting.gpu.bandwidth * setting.assume.bandwidth)


def _reduced(numbers: float, setting: Setting) -> Terms:
    if setting.tensor_parallel == 1:
        return Terms()
    size = ACTIVATION * setting.batch * numbers
    seconds = all_reduce(size, setting.tensor_parallel, setting.gpu, setting.assume)
    return Terms(all_reduces=seconds, reductions=1)


def _share(size: int, what: str, setting: Setting) -> int:
    """What one GPU has of ``size``."""
    if size % setting.tensor_parallel:
        raise KernelError(f"{what}, {size}, cannot be divided among {setting.tensor_parallel} GPUs: take fewer")
    return size // setting.tensor_parallel
