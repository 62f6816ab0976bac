"""Fuse: FFNs of one sum that read the same value become one wide FFN.

Source: FFN Fusion (arXiv 2503.18908), equation 5 and theorem 3.1. Where the paper keeps the norm of the group's last
layer for all, each FFN here keeps its own, exactly: its gain is folded into the rows it multiplies (as FlattenGPT,
arXiv 2602.08858, does), its shift into their bias, and what is left of the norms is one value that all share.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxfuse.ffn.affine import unfoldable
from fxfuse.ffn.anatomy import FFN
from fxfuse.graph.ops import op
from fxfuse.graph.order import overwritten, regions
from fxfuse.graph.surgery import erase_dead, transaction
from fxfuse.graph.value_numbering import Numbering
from fxfuse.graph.values import shape
from fxfuse.passes.base import Edit, PassReport
from fxfuse.passes.compatible import difference, form
from fxfuse.passes.emit.kernel import Kernel, Kernels, kernel_alone, kernel_of
from fxfuse.passes.emit.wide import emit_batched, emit_wide
from fxfuse.passes.normalise.normal import normal_streams
from fxfuse.passes.verify import Verifier
from fxfuse.stream.branch import Branch, Term
from fxfuse.stream.rewrite import resum
from fxfuse.stream.sums import Sum


def fuse_ffn(
    gm: fx.GraphModule,
    share: bool = False,
    *,
    kernels: Kernels = "auto",
    alone: bool = False,
    inputs: Sequence[object] | None = None,
    verify: bool = False,
    max_rewrites: int | None = None,
) -> PassReport:
    """Replace every set of parallel FFNs of one form by one wide FFN. Exact; changes no other value.

    Args:
        gm: a graph; a sum of it that holds several FFNs of one input is what there is to fuse.
        share: use the weights as they are, so that the packed tensors can be the model's own memory: gains stay
            outside, and the wide FFN is a batch of GEMMs of one size instead of one GEMM. FFNs of different widths do
            not fuse then.
        kernels: what computes them: fxfuse's own kernels on GPUs and ATen elsewhere ("auto"), or always "fxfuse" or
            "aten". Of shared weights and of what the kernels cannot express ATen does, and the report says so.
        alone: let fxfuse's kernels compute gated FFNs that are fused with no other, too; under "auto", those for which
            they are modelled to be faster. It takes a copy of gate and up.
        inputs: example inputs of the graph, for ``verify``.
        verify: compare each wide FFN with the FFNs it replaces, in float64 on ``inputs``.
        max_rewrites: how many sets to fuse at most, the first ones in stream order.

    Returns:
        the groups fused; refused are FFNs that stand in parallel with others and cannot join them, and why.

    Raises:
        VerifyError: a wide FFN is not the sum of those it replaces. The graph is then as it was.
        OptionError: ``verify`` without ``inputs``.
    """
    report = PassReport("fuse_ffn")
    verifier = Verifier.of(gm, inputs, verify)
    with transaction(gm):
        streams = normal_streams(gm)
        rewritten, region = overwritten(gm.graph), regions(gm.graph)
        sets: list[_Set] = []
        for stream in streams:
            numbering = Numbering({point: point for point in stream.levels})
            for each in stream.sums:
                count = sum(branch.kind in ("gated_ffn", "ffn") for branch in each.branches)
                if count > 1 or (count and alone):
                    sets += _alike(each, share, numbering, rewritten, region, report)
        how = {each: "weights='share'" if share else _kernel(each, kernels, alone) for each in sets}
        sets = [each for each in sets if len(each.branches) > 1 or isinstance(how[each], Kernel)]
        fused = sets if max_rewrites is None else sets[:max_rewrites]
        report.done += [Edit(each.names, "fused", _detail(each, how[each], kernels)) for each in fused]
        report.refused += [Edit(each.names, "fuse", "max_rewrites is spent") for each in sets[len(fused) :]]
        # Backwards, so that the points which a sum's branches read are still those that the stream knows.
        for residual in dict.fromkeys(each.residual for each in reversed(fused)):
            _write(gm.graph, residual, [each for each in fused if each.residual is residual], share, how, verifier)
    return report


def _kernel(each: _Set, kernels: Kernels, alone: bool) -> Kernel | str:
    if len(each.branches) > 1:
        return kernel_of(each.branches, kernels)
    return kernel_alone(each.branches[0], kernels) if alone else "it stands in parallel with no other"


def _detail(each: _Set, how: Kernel | str, kernels: Kernels) -> str:
    computed = "fxfuse's kernels" if isinstance(how, Kernel) else f"ATen, because {how}" if kernels == "fxfuse" else ""
    return f"one FFN of width {each.width}" + (f", by {computed}" if computed else "")


@dataclass(frozen=True)
class _Set:
    """FFNs of one form that are added in one sum; perhaps only one."""

    residual: Sum
    branches: tuple[Branch, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(branch.name for branch in self.branches)

    @property
    def width(self) -> int:
        return sum(branch.ffn.projections[0].width for branch in self.branches if branch.ffn is not None)


def _alike(
    each: Sum,
    share: bool,
    numbering: Numbering,
    rewritten: Container[fx.Node],
    region: Mapping[fx.Node, int],
    report: PassReport,
) -> list[_Set]:
    """The sets of FFNs of one form among the branches of a sum; ``report`` learns who is with no other, and why."""
    alike: dict[Hashable, list[Branch]] = {}
    for branch in each.branches:
        if branch.ffn is None:
            if branch.gate_up is not None:
                rounding = "" if share else unfoldable(branch.gate_up.normed)
                report.refused.append(Edit((branch.name,), "fuse", "; ".join(filter(None, (branch.reason, rounding)))))
            continue
        reason = ""
        if each.write is not None or _input(branch.ffn) in rewritten:
            reason = "what it reads or adds to is written in place"
        elif share and shape(branch.ffn.projections[0].input) is None:
            reason = "the graph does not tell the sizes of what it reads; give the pass example inputs"
        elif any(region[node] != region[each.out] for node in branch.body):
            reason = "it stands in another autocast or no_grad region than the sum it is added in"
        elif not share:
            reason = unfoldable(branch.ffn.normed)
        if reason:
            report.refused.append(Edit((branch.name,), "fuse", reason))
            continue
        width = branch.ffn.projections[0].width if share else None
        alike.setdefault((form(branch, numbering), width), []).append(branch)
    for branches in alike.values():
        if len(branches) == 1 and sum(branch.ffn is not None for branch in each.branches) > 1:
            reason = difference(branches[0], each.branches, numbering)
            report.refused.append(Edit((branches[0].name,), "fuse", reason))
    return [_Set(each, tuple(branches)) for branches in alike.values()]


def _write(
    graph: fx.Graph,
    residual: Sum,
    sets: Sequence[_Set],
    share: bool,
    how: Mapping[_Set, Kernel | str],
    verifier: Verifier | None,
) -> None:
    """Write the wide FFNs of one sum, and the sum anew with them instead of their members."""
    wide: list[Term] = []
    for each in sets:
        with graph.inserting_before(residual.out):
            kernel = how[each]
            if share:
                made = emit_batched(graph, each.branches, residual.stream.node)
            else:
                own = kernel if isinstance(kernel, Kernel) else None
                made = emit_wide(graph, each.branches, residual.stream.node, own)
        wide.append(Term(made))
        if verifier is not None:
            verifier.check([([Term(made)], [branch.terms[0] for branch in each.branches])], "one FFN", each.names)
    gone = {branch.terms[0] for each in sets for branch in each.branches}
    resum(graph, residual, [*(term for term in residual.terms if term not in gone), *wide], {})
    erase_dead(graph, [term.node for term in gone])


def _input(ffn: FFN) -> fx.Node:
    """What a wide FFN reads instead of ``ffn``."""
    found = op(ffn.normed.bare) if ffn.normed.fused_call else None
    source = found.node("input") if found is not None else None
    return ffn.normed.bare if source is None else source
