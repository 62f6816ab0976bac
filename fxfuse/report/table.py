"""The table of branches: a row a line, at 80 columns. What does not fit is told below, and whole in the data."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from fxfuse.plan import Decision

if TYPE_CHECKING:
    from fxfuse.report.explanation import BranchInfo

WIDTH = 80
NAME = 26
"""Columns that a name may take; a longer one loses its beginning."""


def table(branches: Sequence[BranchInfo], planned: bool) -> list[str]:
    """The lines of the table: one part for each stream, the beginning that its names share said once."""
    lines: list[str] = []
    parts = [list(rows) for _, rows in groupby(branches, lambda row: (row.graph, row.stream))]
    for rows in parts:
        prefix = shared_path([row.name for row in rows])
        titles = [f"graph {rows[0].graph}, stream {rows[0].stream}"] if len(parts) > 1 else []
        titles += [f"names begin with {prefix}"] if prefix else []
        lines += [", ".join(titles)] if titles else []
        lines += [*_part(rows, prefix, planned), *([""] if len(parts) > 1 else [])]
    if not planned and any(join.once for row in branches for join in row.joins):
        lines.append("* once what stands between is dropped; fxfuse record and plan tell what it costs")
    return lines


def decisions(made: Sequence[Decision], branches: Sequence[BranchInfo]) -> list[str]:
    """The decisions of a plan, as text."""
    prefix = shared_path([row.name for row in branches])
    texts = [str(decision).replace(prefix, "") if prefix else str(decision) for decision in made]
    lines = ["decisions of the plan:"] if made else []
    for text in texts:
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    return lines


def shared_path(names: Sequence[str]) -> str:
    """The beginning, up to a dot, that all names share but those like ``@3``; at least one part of each is left."""
    paths = [name.split(".")[:-1] for name in names if not name.startswith("@")]
    shared = 0
    while paths and all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return "".join(f"{part}." for part in paths[0][:shared]) if paths else ""


def _part(rows: Sequence[BranchInfo], prefix: str, planned: bool) -> list[str]:
    middle = ("plan", "fused") if planned else ("reads", "weights")
    cells = [("branch", "kind", *middle)]
    cells += [
        (_tail(row.name.removeprefix(prefix)), row.kind, row.edit, row.fused)
        if planned
        else (_tail(row.name.removeprefix(prefix)), row.kind, str(row.reads), _short(row.parameters))
        for row in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    cells.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]  # four of them
    room = WIDTH - sum(widths) - 2 * len(widths)
    notes, below = ["note", "----"], dict[str, int]()
    for row in rows:
        text = next((text for text in _notes(row, prefix, planned) if len(text) <= room), None)
        if text is None:
            text = _notes(row, prefix, planned)[-1]
            mark = f"... ({below.setdefault(text, len(below) + 1)})"
            text = text[: room - len(mark)].rstrip() + mark
        notes.append(text)
    lines = [
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)), note]).rstrip()
        for row, note in zip(cells, notes, strict=True)
    ]
    for text, number in below.items():
        lines += textwrap.wrap(f"({number}) {text}", WIDTH, subsequent_indent="    ", break_long_words=False)
    return lines


def _notes(row: BranchInfo, prefix: str, planned: bool) -> list[str]:
    """What there is to say of a branch, in the words to be preferred, and in others if these are too long."""
    if not row.joins:
        reason = "" if row.reason == row.kind else row.reason
        return [reason.replace(prefix, "") if prefix else reason]
    named = [f"{join.other.removeprefix(prefix)}{'*' * bool(join.once)}" for join in row.joins]
    stars = "*" * any(join.once for join in row.joins)
    return [f"could join {' and '.join(named)}", f"could join its neighbour{'s' * (len(named) > 1)}{stars}"]


def _tail(name: str) -> str:
    return name if len(name) <= NAME else f"...{name[3 - NAME :]}"


def _short(count: int) -> str:
    """As in 512, 885K, 2.65M, 1.2B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
