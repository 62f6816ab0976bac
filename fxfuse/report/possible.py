"""Which FFNs could become a part of one wide FFN with a neighbour, if a plan said so: tried, on a copy of the graph.

The passes that would apply such a plan are asked, so that what is said here is what they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import fx

from fxfuse.errors import FxfuseError
from fxfuse.graph.surgery import copy_graph
from fxfuse.passes import REPORTS, apply_plan
from fxfuse.passes.base import PassReport
from fxfuse.plan import Plan
from fxfuse.stream.finder import ResidualStream

LONELY = "no other FFN that can be made wide stands next to it in the stream"


@dataclass(frozen=True)
class Join:
    """A neighbour that an FFN could become one with.

    Attributes:
        other: its name.
        once: the branches that stand between the two, and would be dropped first.
    """

    other: str
    once: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.other} once {_listed(self.once)} dropped" if self.once else self.other


@dataclass
class Possible:
    """What could be done with each FFN: whom it could join, the one before it first; why not, if nobody."""

    joins: dict[str, tuple[Join, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def possible(gm: fx.GraphModule, names: Mapping[fx.Node, str], streams: Sequence[ResidualStream]) -> Possible:
    """What could be done with the FFNs of ``streams``, those of the simplified graph ``gm``, which stays as it is."""
    found = Possible()
    for stream in streams:
        for run in _runs(stream):
            _try(gm, names, run, found)
    return found


_Run = list[tuple[str, tuple[str, ...]]]
"""FFNs in stream order, each with the branches that stand between it and the one before."""


def _runs(stream: ResidualStream) -> Iterator[_Run]:
    """The FFNs that can be made wide, parted where an FFN that can not, or experts, stand between."""
    run: _Run = []
    between: list[str] = []
    level = -1
    for index, residual in enumerate(stream.sums):
        ffns = [branch.name for branch in residual.branches if branch.ffn is not None]
        others = [branch for branch in residual.branches if branch.ffn is None]
        between += [branch.name for branch in others]
        if any(branch.kind not in ("attention", "linear", "other") for branch in others):
            yield run
            run = []
        for name in ffns:
            run.append((name, tuple(between) if run and level != index else ()))
            level, between = index, [branch.name for branch in others]
    yield run


def _try(gm: fx.GraphModule, names: Mapping[fx.Node, str], run: _Run, found: Possible) -> None:
    """Note what becomes of ``run`` as one group with nothing between; of its halves, if the passes raise for all."""
    members = [name for name, _ in run]
    if len(run) < 2:
        found.reasons |= {name: LONELY for name in members if name not in found.joins | found.reasons}
        return
    gone = tuple(dict.fromkeys(name for _, between in run[1:] for name in between))
    try:
        reports = _applied(gm, names, Plan(drop=gone, parallel=(tuple(members),)))
    except FxfuseError as error:
        half = len(run) // 2
        if len(run) > 2:
            _try(gm, names, run[: half + 1], found)
            _try(gm, names, run[half:], found)
        else:
            found.reasons |= {name: str(error) for name in members if name not in found.joins}
        return
    (fused,) = (report for report in reports if report.name == "fuse_ffn")
    for wide in (edit.branches for edit in fused.done):
        held = [index for index, name in enumerate(members) if name in wide]
        for one, other in pairwise(held):
            once = tuple(dict.fromkeys(name for _, between in run[one + 1 : other + 1] for name in between))
            first, second = members[one], members[other]
            found.joins[first] = (*found.joins.get(first, ()), Join(second, once))
            found.joins[second] = (*found.joins.get(second, ()), Join(first, once))
    for edit in fused.refused:
        found.reasons |= {name: edit.detail for name in edit.branches if name in members}


def _applied(gm: fx.GraphModule, names: Mapping[fx.Node, str], plan: Plan) -> tuple[PassReport, ...]:
    own = fx.GraphModule(gm, copy_graph(gm.graph))
    own.meta = dict(gm.meta)
    copied = dict(zip(gm.graph.nodes, own.graph.nodes, strict=True))
    apply_plan(own, plan, names={copied[node]: name for node, name in names.items()})
    reports: tuple[PassReport, ...] = own.meta[REPORTS]
    return reports


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]} are" if len(names) > 1 else f"{names[0]} is"
