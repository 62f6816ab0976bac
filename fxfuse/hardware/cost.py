"""Modelled time, not measured: n FFNs one after the other, and as one wide FFN in our kernels.

Fusing changes neither bytes nor FLOPs by much. What it saves are launches, idle multiprocessors in the last wave, and
all-reduces: tensor-parallel GPUs add up once for n FFNs and not n times.

Sources: `times` for the GEMMs, `links` for the all-reduces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxfuse.errors import KernelError
from fxfuse.hardware.configs import LOOP_ROWS, Gemm
from fxfuse.hardware.gpus import Gpu
from fxfuse.hardware.links import ALL_REDUCE, between
from fxfuse.hardware.pick import pick
from fxfuse.hardware.times import USUAL, Assumptions, Estimate, library_gemm, own_gemm, peak

ALL_REDUCE_SECONDS = ALL_REDUCE[8]
"""By bytes, on eight H100."""


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


def roofline(layer: Layer, count: int, gpu: Gpu) -> float:
    """No kernels are faster, seconds: weights and tokens move once, at the data sheet's rates. All-reduces are free."""
    f = count * layer.width // layer.tensor_parallel
    flops, moved = 6 * layer.tokens * layer.d * f, layer.item * (3 * layer.d * f + 2 * layer.tokens * layer.d)
    return max(moved / gpu.bandwidth, flops / peak(layer.dtype, gpu))


def sequential(layer: Layer, count: int, gpu: Gpu, assume: Assumptions = USUAL) -> Estimate:
    """``count`` FFNs one after the other, each in four launches as a serving engine makes them.

    Norm and add, gate and up, activation, down; the GEMMs by a vendor's library.
    """
    M, d, f = layer.tokens, layer.d, layer.width // layer.tensor_parallel
    one = _pass(4 * M * d * layer.item, gpu, assume)
    first, second = gemms(layer, 1)
    one += library_gemm(first, gpu, assume)
    one += _pass(3 * M * f * layer.item, gpu, assume)
    one += library_gemm(second, gpu, assume)
    return (one + _all_reduce(layer, assume)) * count


def fused(layer: Layer, count: int, gpu: Gpu, assume: Assumptions = USUAL) -> Estimate:
    """``count`` FFNs as one wide FFN, in our kernels with the tiles that `pick` picks."""
    first, second = gemms(layer, count)
    one, two = pick(first, gpu), pick(second, gpu)
    total = own_gemm(first, one, gpu, assume) + own_gemm(second, two, gpu, assume)
    if one.rows > LOOP_ROWS:
        total += _pass(layer.tokens * layer.d * layer.item, gpu, assume)
    return total + _all_reduce(layer, assume)


def pays(layer: Layer, gpu: Gpu, assume: Assumptions = USUAL) -> bool:
    """Whether one FFN that is fused with no other is faster in our kernels than in a vendor's GEMMs."""
    return fused(layer, 1, gpu, assume).seconds < sequential(layer, 1, gpu, assume).seconds


def gemms(layer: Layer, count: int) -> tuple[Gemm, Gemm]:
    """What one GPU multiplies for ``count`` fused FFNs: gate and up, then down."""
    M, d, f = layer.tokens, layer.d, count * layer.width // layer.tensor_parallel
    aligned = d % 16 == 0 and f % 16 == 0
    return Gemm("gate_up", M, f, d, layer.dtype, aligned), Gemm("down", M, d, f, layer.dtype, aligned)


def _pass(moved: int, gpu: Gpu, assume: Assumptions) -> Estimate:
    return Estimate(assume.pass_launch + moved / (gpu.bandwidth * assume.bandwidth), moved, launches=1)


def _all_reduce(layer: Layer, assume: Assumptions) -> Estimate:
    """Of the tokens ``[M, d]``: linear between the table's sizes, never faster than its smallest."""
    if layer.tensor_parallel == 1:
        return Estimate(0.0)
    size = layer.tokens * layer.d * layer.item
    return Estimate(between(size, ALL_REDUCE_SECONDS, assume.all_reduce_bandwidth), all_reduces=1)
