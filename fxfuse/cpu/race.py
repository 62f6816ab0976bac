"""Which of two ways to compute a linear map is faster on this machine: measured, once for each size.

Each weight of a sample is another one, more of them than a cache holds, because in a model each comes from memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Linear: TypeAlias = Callable[[Tensor, Tensor], object]

MARGIN = 0.95
"""The challenger must take less than this share of the time: what is not inductor's own costs it some freedom."""

_BYTES = 1 << 26
_SAMPLES = 5


def wins(challenger: Linear, champion: Linear, rows: int, fan_in: int, fan_out: int) -> bool:
    """Whether ``challenger`` multiplies float32 ``[rows, fan_in]`` with weights ``[fan_out, fan_in]`` faster."""
    with torch.no_grad(), _disable_current_modes():
        x = torch.randn(rows, fan_in)
        weights = [torch.randn(fan_out, fan_in) for _ in range(max(1, min(64, _BYTES // (4 * fan_in * fan_out))))]
        seconds(challenger, x, weights), seconds(champion, x, weights)
        samples = [(seconds(challenger, x, weights), seconds(champion, x, weights)) for _ in range(_SAMPLES)]
    return min(one for one, _ in samples) < MARGIN * min(other for _, other in samples)


def seconds(linear: Linear, x: Tensor, weights: Sequence[Tensor]) -> float:
    """Of one call for each of the weights."""
    start = time.perf_counter()
    for weight in weights:
        linear(x, weight)
    return time.perf_counter() - start
