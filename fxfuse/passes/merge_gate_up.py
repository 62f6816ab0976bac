"""Merge gate and up: projections that read one value as one GEMM. Exact; it takes a copy of their weights.

Those of one FFN (the packed ``gate_up_proj`` of vLLM and of Phi-3's checkpoints), and those of FFNs that stand in
parallel and cannot be one wide FFN, because a norm or an activation of its own keeps each apart from the others.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from torch import fx

from fxfuse.ffn.affine import unfoldable
from fxfuse.ffn.anatomy import GateUp, Projection
from fxfuse.graph.order import sort
from fxfuse.graph.surgery import erase_dead
from fxfuse.graph.value_numbering import Numbering
from fxfuse.graph.values import dtype, value
from fxfuse.packing.expressions import PACK
from fxfuse.packing.strategy import BY_OPTION, COPIED, Copied, Weights
from fxfuse.passes.base import Edit, Fusion, PassReport
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.compatible import SHARED_QUANTIZED, bare_key, difference
from fxfuse.passes.emit.wide import can_be_given_the_shape_of, emit_projections
from fxfuse.passes.runner import run
from fxfuse.passes.verify import Claim
from fxfuse.stream.branch import Branch, Term
from fxfuse.stream.sums import Sum


@dataclass(frozen=True)
class _Group:
    """FFNs whose projections read one value (but for the gains of ``folded``), and what keeps them from being one."""

    members: tuple[tuple[str, GateUp], ...]
    folded: bool
    reason: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.members)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(projection for _, half in self.members for projection in half.projections)

    @property
    def detail(self) -> str:
        return "gate and up in one GEMM" + (f"; no wider: {self.reason}" if len(self.members) > 1 else "")


@dataclass(frozen=True)
class MergeGateUp(Fusion[_Group]):
    """See :func:`merge_gate_up`."""

    name, verb, done, product = "merge_gate_up", "merge", "merged", "one GEMM"
    weights: Copied = COPIED
    merge_gate_up: bool = True

    def find(self, graph: Canonical, report: PassReport) -> list[_Group]:
        groups: list[_Group] = []
        for stream in graph.streams:
            numbering = Numbering({point: point for point in stream.levels})
            for residual in stream.sums:
                groups += _groups(residual, self.weights, numbering, graph.overwritten, graph.regions, report)
        return [group for group in groups if self.merge_gate_up or len(group.members) > 1]

    def write(self, graph: Canonical, rewrites: Sequence[_Group]) -> Iterator[tuple[_Group, Claim]]:
        hazard, region = graph.hazards, graph.regions
        order = {node: index for index, node in enumerate(graph.graph.nodes)}
        made = [_write(graph.graph, group, order) for group in rewrites]
        pairs = [list(zip(new, group.projections, strict=True)) for new, group in zip(made, rewrites, strict=True)]
        # A weight may be an expression, such as w.t(), that the model writes down only after the first projection.
        sort(graph.graph, hazard, region)
        for own, group in zip(pairs, rewrites, strict=True):
            yield group, Claim([([Term(new)], [Term(old.output)]) for new, old in own])
        for new, old in chain.from_iterable(pairs):
            new.meta.update(old.output.meta)
            old.output.replace_all_uses_with(new)
            erase_dead(graph.graph, [old.output])
        sort(graph.graph, hazard, region)


def merge_gate_up(
    gm: fx.GraphModule,
    weights: Weights = "copy",
    *,
    alone: bool = True,
    inputs: Sequence[object] | None = None,
    verify: bool = False,
    max_rewrites: int | None = None,
) -> PassReport:
    """Let FFNs that stand in parallel compute gate and up in one GEMM over the rows of all; each goes on by itself.

    Args:
        gm: a graph.
        weights: "copy", or "share" to use the weights as they are (see :func:`fxfuse.passes.fuse_ffn`): FFNs join only
            if they read the very same value, the gain of their norm included.
        alone: do the same to the gate and up of an FFN that stands in parallel with none.
        inputs: example inputs of the graph, for ``verify``.
        verify: compare each projection with what replaces it, in float64 on ``inputs``.
        max_rewrites: how many GEMMs to make at most, the first ones in stream order.

    Raises:
        VerifyError: a projection is not what it was. The graph is then as it was.
        OptionError: ``verify`` without ``inputs``.
    """
    return run(gm, MergeGateUp(BY_OPTION[weights], alone), inputs=inputs, verify=verify, max_rewrites=max_rewrites)


def _groups(
    residual: Sum,
    weights: Copied,
    numbering: Numbering,
    rewritten: Container[fx.Node],
    region: Mapping[fx.Node, int],
    report: PassReport,
) -> list[_Group]:
    """The FFNs of a sum by what their projections read; ``report`` learns who must be left alone, and why."""
    alike: dict[Hashable, list[Branch]] = {}
    several = sum(branch.gate_up is not None for branch in residual.branches) > 1
    for branch in residual.branches:
        half = branch.gate_up
        if half is None or any(PACK in p.weight.meta for p in half.projections):
            continue  # the latter is wide already
        blocks = half.blocks
        if reason := half.unpackable or (SHARED_QUANTIZED if blocks and not weights.folds else ""):
            report.refused.append(Edit((branch.name,), "merge", reason))
            continue
        first = half.projections[0]
        rounding = unfoldable(half.normed) if weights.folds and blocks is None else ""
        if rounding and several:
            reason = "; ".join(filter(None, (branch.reason, rounding)))
            report.refused.append(Edit((branch.name,), "merge with others", reason))
        key = (
            numbering[first.input] if rounding or blocks or not weights.folds else bare_key(half.normed, numbering),
            blocks,
            region[first.output],
            tuple({dtype(node) for p in half.projections for node in (p.input, p.weight)}),
            None if (first_weight := value(first.weight)) is None else first_weight.device,
        )
        alike.setdefault(key, []).append(branch)
    found_groups: list[_Group] = []
    for branches in alike.values():
        group = _group(branches, residual, numbering)
        reason = _obstacle(group, rewritten)
        if reason:
            report.refused.append(Edit(group.names, "merge", reason))
        elif len(group.projections) > 1:
            found_groups.append(group)
    return found_groups


def _group(branches: Sequence[Branch], residual: Sum, numbering: Numbering) -> _Group:
    members = tuple((branch.name, branch.gate_up) for branch in branches if branch.gate_up is not None)
    folded = len({numbering[half.projections[0].input] for _, half in members}) > 1
    reasons = dict.fromkeys(
        branch.reason if branch.ffn is None else difference(branch, residual.branches, numbering)
        for branch in (branches if len(branches) > 1 else ())
    )
    return _Group(members, folded, "; ".join(reasons))


def _obstacle(group: _Group, rewritten: Container[fx.Node]) -> str:
    """Why the group has to be left alone; an empty string if it can be merged."""
    different = {projection.weight for projection in group.projections}
    if len(group.projections) > 1 and len(different) < (len(group.projections) if len(group.members) == 1 else 2):
        return "its projections are one GEMM already"
    if any(node in rewritten for _, half in group.members for node in (half.normed.bare, half.normed.output)):
        return "what it reads is overwritten in place later"
    if any(not can_be_given_the_shape_of(p, half, group.folded) for _, half in group.members for p in half.projections):
        return "its projections come in a shape that is not their input's"
    return ""


def _write(graph: fx.Graph, group: _Group, order: Mapping[fx.Node, int]) -> list[fx.Node]:
    """The projections of the group, computed anew in one GEMM, in the place of the first of them."""
    first, half = min(
        ((projection.output, half) for _, half in group.members for projection in half.projections),
        key=lambda candidate: order[candidate[0]],
    )
    with graph.inserting_before(first):
        return emit_projections(graph, half, [half for _, half in group.members], group.folded, " + ".join(group.names))
