"""Which FFNs follow each other with nothing between them, and how to part them into groups.

The paper (arXiv 2503.18908) searches no groups: it takes each attention-free run, leaves out its last FFN, and parts
the rest by memory. Here a run is also parted where the recording says that FFNs depend on each other too much.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fxfuse._common.bounds import check_bound, check_count
from fxfuse.measure.recording import BranchRecord, Recording

FFNs: TypeAlias = tuple[str, ...]
"""Names of consecutive FFNs, in stream order."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a group must keep to.

    Attributes:
        max_distance: the largest recorded mean distance (cosine, 0..2) of any two members.
        max_width: the largest sum of hidden units.
        keep_last: leave the last FFN of each run alone, as the paper does. It found that the models were better for it;
            the cause is not known, and it is not always so.

    Raises:
        OptionError: a limit out of range.
    """

    max_distance: float | None = None
    max_width: int | None = None
    keep_last: bool = False

    def __post_init__(self) -> None:
        check_bound("max_distance", self.max_distance, "a cosine distance, 0..2")
        check_count("max_width", self.max_width)

    def allow(self, recording: Recording, group: Sequence[str]) -> bool:
        """Whether ``group`` keeps to all of them (but ``keep_last``, which is about runs)."""
        near = self.max_distance is None or distance(recording, group) <= self.max_distance
        return near and (self.max_width is None or width(recording, group) <= self.max_width)


def sums(recording: Recording, drop: Collection[str] = ()) -> Iterator[list[list[BranchRecord]]]:
    """For each stream its residual sums in order, each the branches that it adds; ``drop`` and empty sums are gone."""
    for stream in sorted({branch.stream for branch in recording.branches}):
        levels: dict[int, list[BranchRecord]] = {}
        for branch in recording.branches:
            if branch.stream == stream and branch.name not in drop:
                levels.setdefault(branch.adds, []).append(branch)
        yield [levels[level] for level in sorted(levels)]


def runs(recording: Recording, drop: Collection[str] = ()) -> tuple[FFNs, ...]:
    """Maximal runs of FFNs that follow each other in one stream once ``drop`` is gone, in stream order.

    Nothing but the FFN itself is added in between, and each reads the stream as the one before left it. FFNs that
    cannot become a part of a wide one, or that the recorded plan has in a group, end a run.
    """
    found: list[list[str]] = []
    for stream in sums(recording, drop):
        levels = [each[0].adds for each in stream]
        found.append([])
        for (first, *others), level in zip(stream, levels, strict=True):
            reads_here = bisect_left(levels, first.reads) == bisect_left(levels, level)
            if others or not reads_here or not first.width or first.name in recording.plan.names:
                found.append([])
            else:
                found[-1].append(first.name)
    return tuple(tuple(run) for run in found if run)


def follow(recording: Recording, group: FFNs, drop: Collection[str]) -> bool:
    """Whether the FFNs of ``group`` follow each other once ``drop`` is gone."""
    return any(group == run[at : at + len(group)] for run in runs(recording, drop) for at in range(len(run)))


def propose_groups(recording: Recording, drop: Collection[str], limits: Limits) -> tuple[FFNs, ...]:
    """The groups of each run, from its first FFN on as long as ``limits`` allow; what stays single is left out.

    A part of an allowed group is allowed, so this greedy choice leaves the fewest FFN steps that any choice does.
    """
    found: list[list[str]] = []
    for run in runs(recording, drop):
        found.append([])
        for name in run[:-1] if limits.keep_last else run:
            if not limits.allow(recording, [*found[-1], name]):
                found.append([])
            found[-1].append(name)
    return tuple(tuple(group) for group in found if len(group) > 1)


def in_two(recording: Recording, group: FFNs) -> tuple[FFNs, FFNs]:
    """``group`` cut in its middle third, where the worse half is best; at least one member on either side."""
    n = len(group)

    def badness(cut: int) -> tuple[float, int]:
        worse = max(worst_distance(recording, group[:cut]), worst_distance(recording, group[cut:]))
        return worse, abs(2 * cut - n)

    cut = min(range(math.ceil(n / 3), 2 * n // 3 + 1), key=badness)
    return group[:cut], group[cut:]


def distance(recording: Recording, group: Iterable[str]) -> float:
    """The largest recorded mean distance of any two members; 0 of fewer than two."""
    return _largest(recording, group, "mean")


def worst_distance(recording: Recording, group: Iterable[str]) -> float:
    """The largest recorded distance of any two members at any token: what a mean over tokens cannot see."""
    return _largest(recording, group, "max")


def width(recording: Recording, group: Iterable[str]) -> int:
    """Hidden units of the wide FFN."""
    return sum(recording.branches[recording.index(name)].width for name in group)


def recorded_kl(recording: Recording, group: FFNs) -> float:
    """What the recording says this very group costs by itself, nats per token; NaN if it says nothing."""
    return next((record.kl for record in recording.groups if record.branches == group), math.nan)


def promise(recording: Recording, group: FFNs) -> tuple[bool, float]:
    """Sorts groups from the best: by recorded KL; those without by the distance of their worst token, after them."""
    kl = recorded_kl(recording, group)
    return (True, worst_distance(recording, group)) if math.isnan(kl) else (False, kl)


def _largest(recording: Recording, group: Iterable[str], matrix: Literal["mean", "max"]) -> float:
    indices = sorted(map(recording.index, group))
    distances = recording.mean if matrix == "mean" else recording.max
    return float(distances[indices][:, indices].triu(1).max()) if indices else 0.0
