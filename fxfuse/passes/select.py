"""Finding what a plan names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import fx

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


def owners_of(streams: Sequence[ResidualStream]) -> Counter[fx.Node]:
    """How many branches each node is a part of."""
    return Counter(node for stream in streams for branch in stream.branches for node in branch.nodes)


def settle(names: Iterable[str], streams: Sequence[ResidualStream]) -> None:
    """Let a linear map be called by the module that a plan names, if nothing else in there is a branch.

    An attention of which pruning left but its output projection goes on being named as before.
    """
    branches = [branch for stream in streams for branch in stream.branches]
    known = {branch.name for branch in branches}
    for name in names:
        inside = [branch for branch in branches if branch.name.startswith(f"{name}.")]
        if name not in known and len(inside) == 1 and inside[0].kind == "linear":
            inside[0].name = name
