"""Whole blocks in parallel: windows of consecutive blocks that depend on each other least.

Source: arXiv 2503.18908, appendix B. Nothing is dropped and nothing becomes one wide FFN; blocks that read one point
can run on different devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TypeAlias

from fxfuse.errors import OptionError
from fxfuse.measure.recording import BranchRecord, Recording
from fxfuse.planning.groups import sums

Block: TypeAlias = tuple[str, str]
"""The names of an attention and of the FFN after it: a private sequence of a plan."""


def block_windows(recording: Recording, size: int = 4, count: int | None = None) -> tuple[tuple[Block, ...], ...]:
    """Groups of ``size`` consecutive blocks for ``Plan.parallel``, those that depend on each other least first.

    Greedy, as in the paper: of all windows take the one whose largest distance between two blocks is least (of equals
    that with the least sum), strike out the windows that overlap it, repeat. The distance of two blocks is here the
    largest recorded mean distance of a branch of the later one when a branch of the earlier one is dropped; the paper
    drops whole blocks.

    Args:
        recording: of a model whose attentions are there.
        size: blocks a window.
        count: windows; all that fit, if None or if there are fewer.

    Raises:
        OptionError: a window of fewer than two blocks, or a count below one.
    """
    if size < 2:
        raise OptionError(f"a window has at least two blocks, not {size}")
    if count is not None and count < 1:
        raise OptionError(f"count must be at least 1, not {count}")
    windows = [run[at : at + size] for run in block_runs(recording) for at in range(len(run) - size + 1)]
    chosen: list[tuple[Block, ...]] = []
    for window in sorted(windows, key=lambda window: _dependence(recording, window)):
        if not any(set(window) & set(other) for other in chosen):
            chosen.append(window)
    return tuple(chosen[:count])


def block_runs(recording: Recording) -> tuple[tuple[Block, ...], ...]:
    """Maximal runs of blocks that follow each other with nothing between them, in stream order.

    A block is an attention and an FFN (or experts), added one after the other or in one sum. What the recorded plan has
    in a group belongs to none.
    """
    found: list[list[Block]] = []
    for stream in sums(recording):
        found.append([])
        rest = stream
        while rest:
            length, block = next(((n, b) for n in (1, 2) if (b := _block(recording, rest[:n]))), (1, None))
            if block is None:
                found.append([])
            else:
                found[-1].append(block)
            rest = rest[length:]
    return tuple(tuple(run) for run in found if run)


def _block(recording: Recording, sums: Sequence[Sequence[BranchRecord]]) -> Block | None:
    """The block that one sum of two branches is, or two sums of one each; None if they are none."""
    branches = [branch for each in sums for branch in each]
    if len(sums) == 1:
        branches.sort(key=lambda branch: branch.kind != "attention")
    if len(branches) != 2 or any(branch.name in recording.plan.names for branch in branches):
        return None
    first, second = branches
    if first.kind != "attention" or second.kind not in ("gated_ffn", "ffn", "moe") or first.reads != first.adds:
        return None
    return first.name, second.name


def _dependence(recording: Recording, window: Sequence[Block]) -> tuple[float, float]:
    """Largest and sum of the distances between the window's blocks."""
    distances = [
        max(float(recording.mean[recording.index(a), recording.index(b)]) for a in earlier for b in later)
        for earlier, later in combinations(window, 2)
    ]
    return max(distances), sum(distances)
