"""Tallies: mean, maximum and 99th percentile of numbers that are too many to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

LOWEST, HIGHEST, STEP = 1e-8, 1e5, 1.06
"""The histogram's bins: from ``LOWEST`` to ``HIGHEST``, each ``STEP`` times as wide as the one before."""

BINS = math.ceil(math.log(HIGHEST / LOWEST) / math.log(STEP)) + 2


class Tally:
    """Mean, maximum and percentiles of ``size`` series of non-negative numbers, added batch by batch.

    Percentiles come from a histogram whose bins are 6% wide, so they are within 3%, whatever the order of the batches.
    Numbers below 1e-8, which is rounding, count as 0.
    """

    def __init__(self, size: int) -> None:
        self.count = torch.zeros(size, dtype=torch.int64)
        self.total = torch.zeros(size, dtype=torch.float64)
        self.largest = torch.zeros(size, dtype=torch.float64)
        self.histogram = torch.zeros(size, BINS, dtype=torch.int32)

    def add(self, index: int, numbers: Tensor) -> None:
        """Add ``numbers``, of any shape, to the series ``index``."""
        flat = numbers.detach().flatten().to(torch.float32).cpu()
        if not flat.numel():
            return
        bins = (flat.clamp(LOWEST, HIGHEST) / LOWEST).log_().div_(math.log(STEP)).floor_().to(torch.int64) + 1
        bins[flat < LOWEST] = 0
        self.histogram[index] += torch.bincount(bins, minlength=BINS).to(torch.int32)
        self.count[index] += flat.numel()
        self.total[index] += flat.double().sum()
        self.largest[index] = torch.maximum(self.largest[index], flat.max().double())

    def mean(self) -> Tensor:
        """Float64 ``[size]``; 0 where nothing was added."""
        return self.total / self.count.clamp_min(1)

    def quantile(self, share: float) -> Tensor:
        """Float64 ``[size]``: the number that ``share`` of a series does not exceed; 0 where nothing was added."""
        wanted = (self.count.double() * share).ceil().clamp_min(1)
        reached = self.histogram.cumsum(1) >= wanted[:, None]
        found = reached.to(torch.int8).argmax(1)
        values = LOWEST * STEP ** (found.double() - 0.5)
        values = torch.minimum(torch.where(found > 0, values, 0.0), self.largest)
        return torch.where(self.count > 0, values, 0.0)

    def state(self) -> dict[str, Tensor]:
        """What :meth:`of` takes."""
        return {"count": self.count, "total": self.total, "largest": self.largest, "histogram": self.histogram}

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Tally:
        """One that goes on from where ``state`` was taken."""
        made = cls(0)
        made.count, made.total = state["count"], state["total"]
        made.largest, made.histogram = state["largest"], state["histogram"]
        return made
