"""Closeness: exact over the reals, and no worse than the model itself in a lower dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_exact(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-8) -> None:
    """Equal in float64 to ``tolerance``, relative to the largest value of each output."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        scale = max(1.0, other.detach().abs().max().item())
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)


def error(runs: Sequence[Sequence[Tensor]], truths: Sequence[Sequence[Tensor]]) -> float:
    """The root mean square error over several runs, relative to that of the truth; the worst output's.

    Over several runs and not the largest of one, because a single small output may be right to the last bit by luck.
    """
    worst = 0.0
    for run, truth in zip(zip(*runs, strict=True), zip(*truths, strict=True), strict=True):
        difference = torch.cat([(one.double() - other).flatten() for one, other in zip(run, truth, strict=True)])
        size = torch.cat([other.flatten() for other in truth]).norm()
        assert difference.isfinite().all()
        worst = max(worst, (difference.norm() / size).item())
    return worst
