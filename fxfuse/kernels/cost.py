"""Modelled time, not measured: n FFNs one after the other, and as one wide FFN in our kernels.

A GEMM takes the longer of moving its bytes and of its waves of tiles; a launch adds what starting and draining a grid
costs inside a CUDA graph. Fusing changes neither bytes nor FLOPs by much. What it saves are launches, idle
multiprocessors in the last wave, and all-reduces: tensor-parallel GPUs add up once for n FFNs and not n times.

Sources: `gpus` for the hardware. The times of all-reduces are measurements of others: SGLang, pull request 2904, eight
H100 with NVLink, without CUDA graphs. Everything else is in `Assumptions`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from itertools import pairwise

import torch

from fxfuse.errors import KernelError
from fxfuse.kernels.configs import LOOP_ROWS, MANY_TOKENS, Config, Gemm, pick, reach
from fxfuse.kernels.gpus import Gpu

ALL_REDUCE_SECONDS: Mapping[int, float] = {
    4_096: 5.7e-6,
    32_768: 7.8e-6,
    262_144: 16.7e-6,
    524_288: 22.1e-6,
    1_048_576: 33.8e-6,
}
"""By bytes, on eight H100."""


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says."""

    bandwidth: float = 0.9
    """Fraction of the memory's bandwidth that a good kernel reaches."""
    flops: float = 0.7
    """Fraction of the peak that a large GEMM reaches with the best tile."""
    gemm_launch: float = 4.0e-6
    """Starting and draining the grid of a GEMM, seconds."""
    pass_launch: float = 2.5e-6
    """The same for a kernel that reads each element once, seconds."""
    all_reduce_bandwidth: float = 257e9
    """Of all-reduces larger than those of the table, bytes/s."""
    library_tiles: tuple[tuple[int, int], ...] = ((128, 256), (128, 128), (64, 128), (64, 64))
    """What a vendor's GEMM chooses from; with few tokens it is assumed to be bound by memory alone."""


@dataclass(frozen=True)
class Layer:
    """One gated FFN with its norm and its residual add."""

    d: int
    """Model width."""
    width: int
    """Hidden units, on all GPUs together."""
    tokens: int
    tensor_parallel: int = 1
    """GPUs among which the hidden units are divided."""
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if min(self.d, self.width, self.tokens, self.tensor_parallel) < 1 or self.width % self.tensor_parallel:
            raise KernelError("sizes must be positive, and the hidden units divisible by the number of GPUs")

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Estimate:
    """What some work costs on each GPU, modelled. Estimates of work done one after the other add up."""

    seconds: float
    bytes: int = 0
    """Read from and written to device memory."""
    flops: int = 0
    launches: int = 0
    all_reduces: int = 0
    waves: float = 0.0
    """Tiles of GEMMs for each multiprocessor."""

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(*(own + its for own, its in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Estimate:
        return Estimate(*(own * times for own in astuple(self)))


def roofline(layer: Layer, count: int, gpu: Gpu) -> float:
    """No kernels are faster, seconds: weights and tokens move once, at the data sheet's rates. All-reduces are free."""
    f = count * layer.width // layer.tensor_parallel
    flops, moved = 6 * layer.tokens * layer.d * f, layer.item * (3 * layer.d * f + 2 * layer.tokens * layer.d)
    return max(moved / gpu.bandwidth, flops / _peak(layer, gpu))


def sequential(layer: Layer, count: int, gpu: Gpu, assume: Assumptions = Assumptions()) -> Estimate:
    """``count`` FFNs one after the other, each in four launches as a serving engine makes them.

    Norm and add, gate and up, activation, down; the GEMMs by a vendor's library.
    """
    M, d, f = layer.tokens, layer.d, layer.width // layer.tensor_parallel
    one = _pass(4 * M * d * layer.item, gpu, assume)
    one += _library_gemm(M, 2 * f, d, layer, gpu, assume)
    one += _pass(3 * M * f * layer.item, gpu, assume)
    one += _library_gemm(M, d, f, layer, gpu, assume)
    return (one + _all_reduce(layer, assume)) * count


def fused(layer: Layer, count: int, gpu: Gpu, assume: Assumptions = Assumptions()) -> Estimate:
    """``count`` FFNs as one wide FFN, in our kernels with the tiles that `pick` picks."""
    first, second = gemms(layer, count)
    one, two = pick(first, gpu), pick(second, gpu)
    total = _own_gemm(first, one, layer, gpu, assume) + _own_gemm(second, two, layer, gpu, assume)
    if one.rows > LOOP_ROWS:
        total += _pass(layer.tokens * layer.d * layer.item, gpu, assume)
    return total + _all_reduce(layer, assume)


def gemms(layer: Layer, count: int) -> tuple[Gemm, Gemm]:
    """What one GPU multiplies for ``count`` fused FFNs: gate and up, then down."""
    M, d, f = layer.tokens, layer.d, count * layer.width // layer.tensor_parallel
    aligned = d % 16 == 0 and f % 16 == 0
    return Gemm("gate_up", M, f, d, layer.dtype, aligned), Gemm("down", M, d, f, layer.dtype, aligned)


def _own_gemm(gemm: Gemm, config: Config, layer: Layer, gpu: Gpu, assume: Assumptions) -> Estimate:
    M, N, K = gemm.M, gemm.N, gemm.K
    # Kernel 1 multiplies twice as many columns as it writes; kernel 2 reads the residual.
    projections, added = (2, 0) if gemm.kernel == "gate_up" else (1, M * N)
    moved = layer.item * (M * K + projections * N * K + M * N + added)
    waves = config.tiles(gemm) * config.split / gpu.multiprocessors
    # In a part of a wave, the multiprocessors at work cannot draw all of the bandwidth.
    memory = moved / (gpu.bandwidth * assume.bandwidth * min(1.0, waves))
    products = _wave(config.rows, projections * config.columns, K / config.split, layer, gpu, assume) * math.ceil(waves)
    seconds = max(memory, products) + assume.gemm_launch
    return Estimate(seconds, moved, 2 * M * projections * N * K, launches=1, waves=waves)


def _library_gemm(M: int, N: int, K: int, layer: Layer, gpu: Gpu, assume: Assumptions) -> Estimate:
    """``[M, K] x [N, K]`` with the best of a library's tiles."""
    moved = layer.item * (M * K + N * K + M * N)
    memory = moved / (gpu.bandwidth * assume.bandwidth)
    options = []
    for rows, columns in assume.library_tiles:
        waves = math.ceil(M / rows) * math.ceil(N / columns) / gpu.multiprocessors
        products = _wave(rows, columns, K, layer, gpu, assume) * math.ceil(waves)
        options.append((memory if M <= MANY_TOKENS else max(memory, products), waves))
    seconds, waves = min(options)
    return Estimate(seconds + assume.gemm_launch, moved, 2 * M * N * K, launches=1, waves=waves)


def _wave(rows: int, columns: int, depth: float, layer: Layer, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds in which every multiprocessor multiplies one tile."""
    rate = assume.flops * reach(rows, columns) * _peak(layer, gpu) / gpu.multiprocessors
    return 2 * rows * columns * depth / rate


def _peak(layer: Layer, gpu: Gpu) -> float:
    return gpu.float_flops if layer.dtype == torch.float32 else gpu.half_flops


def _pass(moved: int, gpu: Gpu, assume: Assumptions) -> Estimate:
    return Estimate(assume.pass_launch + moved / (gpu.bandwidth * assume.bandwidth), moved, launches=1)


def _all_reduce(layer: Layer, assume: Assumptions) -> Estimate:
    """Of the tokens ``[M, d]``: linear between the table's sizes, never faster than its smallest."""
    if layer.tensor_parallel == 1:
        return Estimate(0.0)
    size, table = layer.tokens * layer.d * layer.item, sorted(ALL_REDUCE_SECONDS.items())
    if size >= table[-1][0]:
        return Estimate(max(table[-1][1], size / assume.all_reduce_bandwidth), all_reduces=1)
    seconds = table[0][1]
    for (low, fast), (high, slow) in pairwise(table):
        if low <= size < high:
            seconds = fast + (size - low) / (high - low) * (slow - fast)
    return Estimate(seconds, all_reduces=1)
