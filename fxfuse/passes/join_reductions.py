"""Join reductions: what is added to the stream in one place is all-reduced once, and not each term by itself. Exact.

An all-reduce is linear: the sum of those of several values is that of their sum. Under tensor parallelism each branch
ends in one. Where a plan has made branches parallel, or the model itself computes attention and FFN from one point,
n of them become one, of the same size: n - 1 latencies less. Fused FFNs have one already (`fxfuse.passes.fuse_ffn`).
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxfuse.graph.peel import Change, layers
from fxfuse.graph.scale import ONE, Scale
from fxfuse.graph.sharded import Reduction, all_reduce, reduced, reduction
from fxfuse.graph.surgery import erase_dead
from fxfuse.graph.values import dtype, shape
from fxfuse.passes.base import Edit, Fusion, PassReport
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.runner import run
from fxfuse.passes.verify import Claim
from fxfuse.stream.branch import STAMP, Term
from fxfuse.stream.rewrite import add_up, resum
from fxfuse.stream.sums import Sum


@dataclass(frozen=True)
class _Part:
    """A term of a sum that is ``scale`` times the all-reduce of ``source``."""

    term: Term
    source: fx.Node
    how: Reduction
    scale: Scale


@dataclass(frozen=True)
class _Joined:
    """Terms of one sum that are all-reduced alike."""

    residual: Sum
    parts: tuple[_Part, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(part.term.node.meta.get(STAMP, part.term.node.name)) for part in self.parts)

    @property
    def detail(self) -> str:
        return f"{len(self.parts)} all-reduces in one"


@dataclass(frozen=True)
class JoinReductions(Fusion[_Joined]):
    """See :func:`join_reductions`."""

    name, verb, done, product = "join_reductions", "join", "joined", "one all-reduce"

    def find(self, graph: Canonical, report: PassReport) -> list[_Joined]:
        if not graph.graph.find_nodes(op="call_function", target=all_reduce):
            return []
        found: list[_Joined] = []
        for residual in (residual for stream in graph.streams for residual in stream.sums):
            joined = _alike(residual, graph.overwritten, graph.regions)
            if residual.write is None:
                found += joined
            else:
                refused = [Edit(each.names, "join", "the sum is written in place") for each in joined]
                report.refused += refused
        return found

    def write(self, graph: Canonical, rewrites: Sequence[_Joined]) -> Iterator[tuple[_Joined, Claim]]:
        # Backwards, so that each sum's stream is still the one that it was found with.
        for residual in dict.fromkeys(joined.residual for joined in reversed(rewrites)):
            terms = list(residual.terms)
            gone: list[Term] = []
            for joined in [joined for joined in rewrites if joined.residual is residual]:
                with graph.graph.inserting_before(residual.out):
                    made = _emitted(graph.graph, joined)
                replaced = [part.term for part in joined.parts]
                yield joined, Claim([([made], replaced)])
                gone += replaced
                terms.append(made)
            resum(graph.graph, residual, [term for term in terms if term not in gone], {})
            erase_dead(graph.graph, [term.node for term in gone])


def join_reductions(
    gm: fx.GraphModule,
    *,
    inputs: Sequence[object] | None = None,
    verify: bool = False,
    max_rewrites: int | None = None,
) -> PassReport:
    """All-reduce the terms of each residual sum once, together, where they are all-reduced alike. Exact.

    Args:
        gm: any graph, DTensors in it or functional collectives. All processes must be given the same one.
        inputs: example inputs of the graph, for ``verify``.
        verify: compare each joined all-reduce with those it replaces, in float64 on ``inputs``, in all processes.
        max_rewrites: how many to make at most, the first ones in stream order.

    Raises:
        VerifyError: a joined all-reduce is not the sum of those it replaces. The graph is then as it was.
        OptionError: ``verify`` without ``inputs``.
    """
    return run(gm, JoinReductions(), inputs=inputs, verify=verify, max_rewrites=max_rewrites)


def _alike(residual: Sum, rewritten: Container[fx.Node], region: Mapping[fx.Node, int]) -> list[_Joined]:
    """The sets of terms of a sum that one all-reduce serves."""
    alike: dict[Hashable, list[_Part]] = {}
    for term in residual.terms:
        part = _part(term)
        if part is None or part.source in rewritten or region.get(part.source) != region[residual.out]:
            continue
        key = (part.how, shape(part.source), dtype(part.source), part.scale.nodes)
        alike.setdefault(key, []).append(part)
    return [_Joined(residual, tuple(parts)) for parts in alike.values() if len(parts) > 1]


def _part(term: Term) -> _Part | None:
    """``term`` as a multiple of an all-reduce that nothing else reads."""
    scale = term.scale
    for taken in layers(term.node, Change.NUMBER | Change.REDUCE, within=lambda inner: len(inner.users) == 1):
        if taken.change is Change.REDUCE:
            found = reduction(taken.node)
            return None if found is None else _Part(term, *found, scale)
        scale = scale * taken.scale
    return None


def _emitted(graph: fx.Graph, joined: _Joined) -> Term:
    """The all-reduce of the sum of what the terms reduce, written at the insertion point."""
    first, *others = joined.parts
    outer = first.scale if all(part.scale == first.scale for part in others) else Scale(1.0, first.scale.nodes)
    own = [ONE if part.scale == outer else replace(part.scale, nodes=()) for part in joined.parts]
    start = first.source
    if not own[0].is_one:
        start = graph.call_function(torch.mul, (start, own[0].number))
        start.meta = {key: held for key, held in first.source.meta.items() if key != STAMP}
    terms = [Term(part.source, scale) for part, scale in zip(others, own[1:], strict=True)]
    made = reduced(graph, add_up(graph, start, terms, start), first.how)
    made.meta[STAMP] = " + ".join(joined.names)
    return Term(made, outer)
