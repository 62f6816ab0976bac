"""Which of two ways to compute a linear map is faster on this machine: measured, once for each size.

Each weight of a sample is another one, more of them than a cache holds, because in a model each comes from memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fxfuse._torch.fake import real_tensors
from fxfuse.hardware.configs import Gemm

Linear: TypeAlias = Callable[[Tensor, Tensor], object]

MARGIN = 0.9
"""The challenger must take less than this share of the time: what is not inductor's own costs it some freedom."""

_BYTES, _WEIGHTS = 1 << 26, 64
_SAMPLES = 11


def linear_map(rows: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> Gemm:
    """A product of ``[rows, fan_in]`` with a weight ``[fan_out, fan_in]``, on as many threads as there are now."""
    return Gemm("linear", rows, fan_out, fan_in, dtype, threads=torch.get_num_threads())


def hint(count: int | torch.SymInt) -> int | None:
    """How many that is, or was when the graph was traced, if it is symbolic; None if nobody knows."""
    known = count.node.hint if isinstance(count, torch.SymInt) else count
    return known if isinstance(known, int) else None


def aten(size: Gemm) -> Linear:
    """PyTorch's own GEMM as inductor calls it: into memory that is there."""
    out = torch.empty(size.M, size.N, dtype=size.dtype)
    return lambda x, weight: torch.mm(x, weight.t(), out=out)


def same(weight: Tensor) -> Tensor:
    return weight


def wins(
    challenger: Linear,
    champion: Linear,
    size: Gemm,
    prepare: Callable[[Tensor], Tensor] = same,
    margin: float = MARGIN,
) -> bool:
    """Whether ``challenger`` is faster, over weights that ``prepare`` has prepared for it."""
    return fastest(champion, [challenger], size, prepare, margin) is challenger


def fastest(
    champion: Linear,
    challengers: Sequence[Linear],
    size: Gemm,
    prepare: Callable[[Tensor], Tensor] = same,
    margin: float = MARGIN,
) -> Linear:
    """The fastest of the ``challengers``, over weights that ``prepare`` has prepared for them, or the ``champion``."""
    with real_tensors():
        x = torch.randn(size.M, size.K).to(size.dtype)
        one = torch.randn(size.N, size.K).to(size.dtype)
        weights = [one.clone() for _ in range(max(1, min(_WEIGHTS, _BYTES // (one.element_size() * one.numel()))))]
        prepared = list(map(prepare, weights))
        contestants = [(champion, weights), *((challenger, prepared) for challenger in challengers)]
        for linear, own in contestants:
            seconds(linear, x, own)
        samples = [[seconds(linear, x, own) for linear, own in contestants] for _ in range(_SAMPLES)]
    limit, *times = (min(times_of_one) for times_of_one in zip(*samples, strict=True))
    best = min(range(len(times)), key=times.__getitem__, default=None)
    return champion if best is None or times[best] >= margin * limit else challengers[best]


def seconds(linear: Linear, x: Tensor, weights: Sequence[Tensor]) -> float:
    """Of one call for each of the weights."""
    start = time.perf_counter()
    for weight in weights:
        linear(x, weight)
    return time.perf_counter() - start
