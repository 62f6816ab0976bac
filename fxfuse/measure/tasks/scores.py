"""The score of a model on a task, and the table of several models: original, planned, healed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


@dataclass(frozen=True)
class TaskScore:
    """What a model scored on one task.

    Attributes:
        task: its name.
        metric: lm_eval's name of what is averaged, ``acc`` or ``exact_match`` for the tasks of this package.
        score: the mean over the task's documents; 1 is all right.
        error: the standard error of that mean, over documents; nan for one document, or where lm_eval gives none.
        documents: how many there were.
        chance: the score of guessing; None for a task that is not of this package.
        each: the score of each document, in order; empty for a metric that is no mean of numbers.
    """

    task: str
    metric: str
    score: float
    error: float
    documents: int
    chance: float | None = None
    each: tuple[float, ...] = ()

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's, for the mean over all documents like these."""
        reach = _reach(self.documents, self.error, confidence)
        return self.score - reach, self.score + reach

    def gain(self, other: TaskScore, confidence: float = 0.95) -> tuple[float, float, float]:
        """How much higher this score is than ``other``'s, and the two ends of the interval of that.

        The same documents were put to both models, so the differences of each are averaged: their interval is
        narrower than the two scores', whose ups and downs are mostly those of the documents.

        Raises:
            ValueError: the two are not of one task's documents.
        """
        if (self.task, self.metric, len(self.each)) != (other.task, other.metric, len(other.each)) or not self.each:
            raise ValueError(f"{self.task} and {other.task} do not have the same documents")
        differences = [one - another for one, another in zip(self.each, other.each, strict=True)]
        mean, count = statistics.fmean(differences), len(differences)
        error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else math.nan
        reach = _reach(count, error, confidence)
        return mean, mean - reach, mean + reach


def _reach(count: int, error: float, confidence: float) -> float:
    return float(stdtrit(count - 1, (1 + confidence) / 2)) * error if count > 1 else math.nan


def table(models: Mapping[str, Sequence[TaskScore]], confidence: float = 0.95) -> str:
    """The scores of several models, a task a line; the first model is the one that the others are compared with.

    Beside each score stands its interval, and for the other models the difference to the first one's, with its own.
    """
    names = list(models)
    rows = [["", "chance", *names, *(f"{name} - {names[0]}" for name in names[1:])]]
    for index, first in enumerate(models[names[0]]):
        found = [models[name][index] for name in names]
        row = [first.task, "" if first.chance is None else f"{first.chance:.3g}"]
        row += [_cell(each.score, *each.interval(confidence)) for each in found]
        row += [_cell(*each.gain(first, confidence), sign="+") if first.each else "" for each in found[1:]]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"{confidence:.3g} intervals, by document; differences over the same documents"])


def _cell(mean: float, low: float, high: float, sign: str = "") -> str:
    """As in ``0.812 (0.760 .. 0.864)``."""
    return f"{mean:{sign}.3f} ({low:{sign}.3f} .. {high:{sign}.3f})"
