"""What fxfuse sees in a model and would do with it: the table of branches."""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

from torch import nn

from fxfuse.backend.frontend import Captured, capture
from fxfuse.backend.naming import elsewhere
from fxfuse.backend.options import Options
from fxfuse.errors import CaptureError, PlanError
from fxfuse.graph.surgery import transaction
from fxfuse.passes import REPORTS, apply_plan, simplify
from fxfuse.passes.base import PassReport
from fxfuse.passes.compatible import NO_OTHER
from fxfuse.passes.select import settle
from fxfuse.plan import Plan, flat
from fxfuse.report.possible import Join, Possible, possible
from fxfuse.report.table import WIDTH, decisions, table
from fxfuse.stream.branch import Branch, Kind, number_of_parameters
from fxfuse.stream.diagnosis import REPORT, Census, census
from fxfuse.stream.finder import find_streams

Fused: TypeAlias = Literal["wide", "gate_up", ""]

LINEAR = "one linear map of its norm: no scores, no cache"
"""What is said of a branch that the plan makes linear."""


@dataclass(frozen=True)
class BranchInfo:
    """One row of the table.

    Attributes:
        name: what a plan calls it.
        kind: gated_ffn, ffn, attention, linear, moe or other.
        graph: the graph that holds it (more than one after graph breaks).
        stream: its residual stream within that graph.
        reads: the number of residual sums before the point that it reads.
        adds: the number of the residual sum that it is added in.
        scale: the number its output is multiplied with on the way to the stream (a symbolic one counts as 1).
        parameters: how many numbers its weights hold, its norm's included.
        edit: what the plan does with it: "drop", "linear", "parallel 0" (the group's number), "linear, parallel 0",
            "narrow to 512" (hidden units) or "".
        fused: "wide" if the plan makes it a part of one wide FFN, "gate_up" if its projections become one GEMM with
            those of others.
        reason: why it is not fused, or no further; without a plan, what could be done with it.
        joins: without a plan, the neighbours with which it could become one wide FFN.
    """

    name: str
    kind: Kind
    graph: int
    stream: int
    reads: int
    adds: int
    scale: float
    parameters: int
    edit: str
    fused: Fused
    reason: str
    joins: tuple[Join, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The branches of a model, in stream order, and what a plan does or could do with them; ``str()`` is a table.

    Attributes:
        branches: the rows.
        graphs, nodes: how many Dynamo made of the model, and how many nodes they have.
        reports: of each pass, graph by graph.
        seen: of a model without branches, what stands in its graphs.
        plan: what is explained.
    """

    branches: tuple[BranchInfo, ...]
    graphs: int
    nodes: int
    reports: tuple[PassReport, ...] = ()
    seen: tuple[Census, ...] = ()
    plan: Plan = field(default_factory=Plan)

    def __str__(self) -> str:
        if not self.branches:
            lines = [f"no residual stream in {self.graphs} graph(s){self._broken}"]
            lines += [f"graph {number}: {each}" for number, each in enumerate(self.seen)]
            return "\n".join([*lines, REPORT])
        kinds = [branch.kind for branch in self.branches]
        summary = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        summary += f" in {self.graphs} graph(s), {self.nodes:,} nodes{self._broken}"
        told = decisions(self.plan.why, self.branches)
        return "\n".join([*table(self.branches, bool(self.plan)), *told, *textwrap.wrap(summary, WIDTH)])

    @property
    def _broken(self) -> str:
        return "; TORCH_LOGS=graph_breaks shows what cut the model into several" if self.graphs > 1 else ""

    def to_json(self) -> str:
        """The same as JSON: ``{"graphs": ..., "nodes": ..., "branches": [...], "seen": [...], "plan": {...}}``.

        ``seen`` is what stands in the graphs of a model without branches, one text a graph.
        """
        branches = [asdict(branch) for branch in self.branches]
        data = {"graphs": self.graphs, "nodes": self.nodes, "branches": branches, "seen": [*map(str, self.seen)]}
        return json.dumps(data | {"plan": json.loads(self.plan.to_json())}, indent=2)


def explain(
    model: nn.Module, *args: object, plan: Plan | str | os.PathLike[str] | None = None, **kwargs: object
) -> Explanation:
    """The residual branches of ``model``, as traced by calling it once, and what ``plan`` would do with each.

    Nothing is compiled and the model is not changed. It may be on any device, also "meta".

    Args:
        model: any module.
        args: of the call, as ``kwargs`` are.
        plan: a plan, or the path of one.
        kwargs: of the call.

    Raises:
        CaptureError: the model is none, or cannot be called or traced.
        PlanError: the plan does not fit, or its file holds none.
        OptionError: ``plan`` is neither a plan nor a path.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"explain takes an nn.Module and the arguments of one call of it, not {type(model).__name__}"
        )
    edits = Options.parse({"plan": plan}).edits
    graphs = capture(model, *args, **kwargs)
    rows: list[BranchInfo] = []
    reports: list[PassReport] = []
    names: set[str] = set()
    for number, captured in enumerate(graphs):
        found, done = _explain_graph(number, captured, model, edits)
        rows += found
        reports += done
        names |= {row.name for row in found}
    _check_groups(edits, names)
    nodes = sum(len(captured.gm.graph.nodes) for captured in graphs)
    seen = () if rows else tuple(census(captured.gm) for captured in graphs)
    return Explanation(tuple(rows), len(graphs), nodes, tuple(reports), seen, edits)


def _check_groups(plan: Plan, names: set[str]) -> None:
    """A group none of whose members any graph holds: what a single graph may pass over, the whole model may not."""
    for index, group in enumerate(plan.parallel):
        if not any(name in names for name in flat(group)):
            raise PlanError(f"parallel[{index}]: the model has none of {', '.join(map(repr, flat(group)))}")


def _explain_graph(
    number: int, captured: Captured, model: nn.Module, plan: Plan
) -> tuple[list[BranchInfo], tuple[PassReport, ...]]:
    gm = captured.gm
    with transaction(gm):
        simplify(gm)
        streams = find_streams(gm, captured.names)
        settle(plan.names, streams)
        could = Possible() if plan else possible(gm, captured.names, streams)
        rows = [
            (branch, stream_number, stream.sums_before(branch.read), index)
            for stream_number, stream in enumerate(streams)
            for index, each in enumerate(stream.sums)
            for branch in each.branches
        ]
        facts = {branch.name: (number_of_parameters(branch), branch.scale.number) for branch, *_ in rows}
        apply_plan(gm, plan, names=captured.names, elsewhere=elsewhere(model, captured.names, plan))
    reports: tuple[PassReport, ...] = gm.meta[REPORTS]
    infos = [
        BranchInfo(
            name=branch.name,
            kind=branch.kind,
            graph=number,
            stream=stream_number,
            reads=reads,
            adds=adds,
            scale=facts[branch.name][1],
            parameters=facts[branch.name][0],
            edit=_edit(branch.name, plan),
            fused=_fused(branch.name, reports),
            reason=_reason(branch, plan, could, reports),
            joins=could.joins.get(branch.name, ()),
        )
        for branch, stream_number, reads, adds in rows
    ]
    return infos, reports


def _edit(name: str, plan: Plan) -> str:
    edits = ["drop"] * (name in plan.drop) + ["linear"] * (name in plan.linear)
    edits += [f"narrow to {len(plan.narrow[name])}"] if name in plan.narrow else []
    edits += [f"parallel {index}" for index, group in enumerate(plan.parallel) if name in flat(group)]
    return ", ".join(edits)


def _fused(name: str, reports: tuple[PassReport, ...]) -> Fused:
    for report in reports:
        if any(name in edit.branches for edit in report.done):
            if report.name == "fuse_ffn":
                return "wide"
            if report.name == "merge_gate_up":
                return "gate_up"
    return ""


def _reason(branch: Branch, plan: Plan, could: Possible, reports: tuple[PassReport, ...]) -> str:
    if _fused(branch.name, reports) == "wide":
        return ""
    for report in reports:
        for edit in report.refused:
            if branch.name in edit.branches:
                return edit.detail
    if branch.name in plan.linear:
        return LINEAR
    if branch.reason or branch.name in plan.drop:
        return branch.reason
    if any(branch.name in flat(group) for group in plan.parallel):
        return NO_OTHER
    if joins := could.joins.get(branch.name):
        return f"could join {', and '.join(map(str, joins))}"
    return could.reasons.get(branch.name, "no FFN stands in parallel with it")
