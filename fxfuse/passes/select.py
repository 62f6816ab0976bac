"""Finding what a plan names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fxfuse.errors import PlanError, nearest
from fxfuse.stream.finder import ResidualStream


def branch_names(streams: Sequence[ResidualStream]) -> tuple[str, ...]:
    return tuple(branch.name for stream in streams for branch in stream.branches)


def check_known(names: Iterable[str], streams: Sequence[ResidualStream]) -> None:
    """Raise PlanError for the first name that no branch has."""
    known = set(branch_names(streams))
    for name in names:
        if name not in known:
            what = nearest(name, known) if known else "; the graph has no residual branches"
            raise PlanError(f"{name!r} is no branch of this graph{what}")
