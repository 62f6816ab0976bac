"""Axes of a chart: from a number to a place, and round numbers to label the axis with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Axis:
    """An axis that goes from ``low`` at the place ``start`` to ``high`` at ``end``; what lies beyond is drawn there.

    Attributes:
        low, high: numbers, ``low < high``; positive on a logarithmic axis.
        start, end: places, in units of the picture.
        log: whether equal steps are equal factors.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of ``value``."""
        bounded = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(bounded / self.low) / math.log(self.high / self.low)
        else:
            share = (bounded - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round numbers on the axis: two at the least, and at the most twice ``count``, which is 5 or more."""
        return _factors(self.low, self.high, count) if self.log else _steps(self.low, self.high, count)


def axis_of(values: Sequence[float], start: float, end: float, *, log: bool = False) -> Axis:
    """An axis that holds all of ``values``, with a little room at its ends.

    On a logarithmic one, numbers that are not positive stand at its lower end; there must be one that is.
    """
    shown = [value for value in values if not log or value > 0]
    low, high = min(shown), max(shown)
    if log:
        low, high = low / 1.3, high * 1.3
    else:
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - room, high + room
    return Axis(low, high, start, end, log)


def _steps(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (*_STEPS, 10.0) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _factors(low: float, high: float, count: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**power for power in powers if low <= 10.0**power <= high]
    if len(tens) > count:
        return tens[:: math.ceil(len(tens) / count)]
    fine = [step * 10.0**power for power in powers for step in _STEPS if low <= step * 10.0**power <= high]
    if 2 <= len(fine) <= 2 * count:
        return fine
    return tens if len(tens) > 1 else _steps(low, high, count)
