"""Fuse: FFNs of one sum that read the same value become one wide FFN.

Source: FFN Fusion (arXiv 2503.18908), equation 5 and theorem 3.1. Where the paper keeps the norm of the group's last
layer for all, each FFN here keeps its own, exactly: its gain is folded into the rows it multiplies (as FlattenGPT,
arXiv 2602.08858, does), its shift into their bias, and what is left of the norms is one value that all share.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxfuse.ffn.affine import unfoldable
from fxfuse.ffn.anatomy import FFN
from fxfuse.graph.ops import op
from fxfuse.graph.surgery import erase_dead
from fxfuse.graph.value_numbering import Numbering
from fxfuse.graph.values import shape
from fxfuse.packing.strategy import BY_OPTION, COPIED, Copied, Weights
from fxfuse.passes.base import Edit, Fusion, PassReport
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.compatible import SHARED_QUANTIZED, difference, form, own_gain
from fxfuse.passes.emit.kernel import Kernel, Kernels, kernel_alone, kernel_of
from fxfuse.passes.emit.wide import emit_batched, emit_wide
from fxfuse.passes.runner import run
from fxfuse.passes.verify import Claim
from fxfuse.stream.branch import Branch, Term
from fxfuse.stream.rewrite import resum
from fxfuse.stream.sums import Sum


@dataclass(frozen=True)
class _Wide:
    """FFNs of one form that are added in one sum, perhaps only one; what computes them, or why ATen does."""

    residual: Sum
    branches: tuple[Branch, ...]
    how: Kernel | str
    detail: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(branch.name for branch in self.branches)


@dataclass(frozen=True)
class FuseFFN(Fusion[_Wide]):
    """See :func:`fuse_ffn`."""

    name, verb, done, product = "fuse_ffn", "fuse", "fused", "one FFN"
    weights: Copied = COPIED
    kernels: Kernels = "auto"
    merge_gate_up: bool = False

    def find(self, graph: Canonical, report: PassReport) -> list[_Wide]:
        wides: list[_Wide] = []
        for stream in graph.streams:
            numbering = Numbering({point: point for point in stream.levels})
            for residual in stream.sums:
                count = sum(branch.kind in ("gated_ffn", "ffn") for branch in residual.branches)
                if count > 1 or (count and self.merge_gate_up):
                    sets = _alike(residual, self.weights, numbering, graph.overwritten, graph.regions, report)
                    wides += [self._wide(residual, branches) for branches in sets]
        return [wide for wide in wides if len(wide.branches) > 1 or isinstance(wide.how, Kernel)]

    def _wide(self, residual: Sum, branches: tuple[Branch, ...]) -> _Wide:
        how: Kernel | str = "it stands in parallel with no other"
        if not self.weights.folds:
            how = f"weights={self.weights.option!r}"
        elif any(branch.ffn is not None and branch.ffn.quantized for branch in branches):
            how = "their weights are quantized"
        elif len(branches) > 1:
            how = kernel_of(branches, self.kernels)
        elif self.merge_gate_up:
            how = kernel_alone(branches[0], self.kernels)
        computed = f"ATen, because {how}" if self.kernels == "fxfuse" else ""
        computed = "fxfuse's kernels" if isinstance(how, Kernel) else computed
        width = sum(branch.ffn.projections[0].width for branch in branches if branch.ffn is not None)
        return _Wide(residual, branches, how, f"one FFN of width {width}" + (f", by {computed}" if computed else ""))

    def write(self, graph: Canonical, rewrites: Sequence[_Wide]) -> Iterator[tuple[_Wide, Claim]]:
        # Backwards, so that the points which a sum's branches read are still those that the stream knows.
        for residual in dict.fromkeys(wide.residual for wide in reversed(rewrites)):
            terms = list(residual.terms)
            gone: list[Term] = []
            for wide in [wide for wide in rewrites if wide.residual is residual]:
                with graph.graph.inserting_before(residual.out):
                    made = Term(self._emitted(graph.graph, wide))
                replaced = [branch.terms[0] for branch in wide.branches]
                yield wide, Claim([([made], replaced)])
                gone += replaced
                terms.append(made)
            resum(graph.graph, residual, [term for term in terms if term not in gone], {})
            erase_dead(graph.graph, [term.node for term in gone])

    def _emitted(self, graph: fx.Graph, wide: _Wide) -> fx.Node:
        start = wide.residual.stream.node
        if not self.weights.folds:
            return emit_batched(graph, wide.branches, start)
        return emit_wide(graph, wide.branches, start, wide.how if isinstance(wide.how, Kernel) else None)


def fuse_ffn(
    gm: fx.GraphModule,
    weights: Weights = "copy",
    *,
    kernels: Kernels = "auto",
    merge_gate_up: bool = False,
    inputs: Sequence[object] | None = None,
    verify: bool = False,
    max_rewrites: int | None = None,
) -> PassReport:
    """Replace every set of parallel FFNs of one form by one wide FFN. Exact; changes no other value.

    Args:
        gm: a graph; a sum of it that holds several FFNs of one input is what there is to fuse.
        weights: "copy", or "share" to use the weights as they are, so that the packed tensors can be the model's own
            memory: gains stay outside, and the wide FFN is a batch of GEMMs of one size instead of one GEMM. FFNs of
            different widths do not fuse then.
        kernels: what computes them: fxfuse's own kernels on GPUs and ATen elsewhere ("auto"), or always "fxfuse" or
            "aten". Of shared weights and of what the kernels cannot express ATen does, and the report says so.
        merge_gate_up: let fxfuse's kernels compute gated FFNs that are fused with no other, too; under "auto", those
            for which they are modelled to be faster. It takes a copy of gate and up.
        inputs: example inputs of the graph, for ``verify``.
        verify: compare each wide FFN with the FFNs it replaces, in float64 on ``inputs``.
        max_rewrites: how many sets to fuse at most, the first ones in stream order.

    Returns:
        the groups fused; refused are FFNs that stand in parallel with others and cannot join them, and why.

    Raises:
        VerifyError: a wide FFN is not the sum of those it replaces. The graph is then as it was.
        OptionError: ``verify`` without ``inputs``.
    """
    pass_ = FuseFFN(BY_OPTION[weights], kernels, merge_gate_up)
    return run(gm, pass_, inputs=inputs, verify=verify, max_rewrites=max_rewrites)


def _alike(
    residual: Sum,
    weights: Copied,
    numbering: Numbering,
    rewritten: Container[fx.Node],
    region: Mapping[fx.Node, int],
    report: PassReport,
) -> list[tuple[Branch, ...]]:
    """The sets of FFNs of one form among the branches of a sum; ``report`` learns who is with no other, and why."""
    alike: dict[Hashable, list[Branch]] = {}
    for branch in residual.branches:
        if branch.ffn is None:
            if branch.gate_up is not None:
                rounding = unfoldable(branch.gate_up.normed) if weights.folds and branch.gate_up.blocks is None else ""
                rounding = rounding or own_gain(branch, residual.branches, numbering)
                report.refused.append(Edit((branch.name,), "fuse", "; ".join(filter(None, (branch.reason, rounding)))))
            continue
        reason = ""
        if residual.write is not None or _input(branch.ffn) in rewritten:
            reason = "what it reads or adds to is written in place"
        elif not weights.folds and shape(branch.ffn.projections[0].input) is None:
            reason = "the graph does not tell the sizes of what it reads; give the pass example inputs"
        elif any(region[node] != region[residual.out] for node in branch.body):
            reason = "it stands in another autocast or no_grad region than the sum it is added in"
        elif branch.ffn.quantized is not None:
            reason = "" if weights.folds else SHARED_QUANTIZED
        elif weights.folds:
            reason = unfoldable(branch.ffn.normed)
        if reason:
            report.refused.append(Edit((branch.name,), "fuse", reason))
            continue
        width = branch.ffn.projections[0].width if not weights.folds else None
        alike.setdefault((form(branch, numbering), width), []).append(branch)
    for branches in alike.values():
        if len(branches) == 1 and sum(branch.ffn is not None for branch in residual.branches) > 1:
            reason = difference(branches[0], residual.branches, numbering)
            report.refused.append(Edit((branches[0].name,), "fuse", reason))
    return [tuple(branches) for branches in alike.values()]


def _input(ffn: FFN) -> fx.Node:
    """What a wide FFN reads instead of ``ffn``."""
    call = op(ffn.normed.bare) if ffn.normed.fused_call else None
    source = call.node("input") if call is not None else None
    return ffn.normed.bare if source is None else source
