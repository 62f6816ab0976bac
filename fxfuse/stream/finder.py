"""The residual streams of a traced graph.

Chains of residual sums (:mod:`fxfuse.stream.sums`) are streams; the terms of their sums are branches. Nothing here
knows a model: only adds, shapes and who depends on whom. The cost is linear in the graph: each branch's body is walked
once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import fx

from fxfuse.errors import PlanError, nearest
from fxfuse.ffn.adapter import REASON as ADAPTED
from fxfuse.ffn.adapter import adapted
from fxfuse.ffn.anatomy import Recogniser, mixes
from fxfuse.graph.ancestors import ancestors
from fxfuse.graph.constant import weight_only
from fxfuse.graph.peel import Change, peel
from fxfuse.graph.values import parameters, same_shape, sizes_only
from fxfuse.stream.branch import KEPT, Branch, Term, kind_of, name_branches, parameters_of
from fxfuse.stream.ends import is_linear_map
from fxfuse.stream.shared_experts import beside
from fxfuse.stream.steps import LINKS, beginning, link, way
from fxfuse.stream.sums import Sum, find_chains


@dataclass(eq=False)
class ResidualStream:
    """A chain of residual sums: each sum's stream is the out of the sum before it, perhaps times a factor.

    ``points`` are the values that the stream has on its way: before the first sum, after each, and after each factor.
    ``levels`` gives every node that is one of them its number: the points proper, and the casts and views through which
    a sum or a branch takes them. ``points[k]`` has level k and is no cast of another point.
    """

    sums: tuple[Sum, ...]
    points: tuple[fx.Node, ...]
    levels: Mapping[fx.Node, int]

    @property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(branch for residual in self.sums for branch in residual.branches)

    def sums_before(self, point: fx.Node) -> int:
        """How many of the sums stand before a point."""
        return sum(self.levels[residual.out] <= self.levels[point] for residual in self.sums)

    def __getitem__(self, name: str) -> Branch:
        for branch in self.branches:
            if branch.name == name:
                return branch
        raise PlanError(f"no branch {name!r} in this stream{nearest(name, (b.name for b in self.branches))}")


def find_streams(gm: fx.GraphModule, names: Mapping[fx.Node, str] | None = None) -> tuple[ResidualStream, ...]:
    """All residual streams of ``gm``, in the order of their first sums. Changes nothing and adds no guards.

    A stream's place among them is its number, for whoever shows or records it.

    Args:
        gm: a graph of Dynamo or torch.export.
        names: dotted parameter names by node, where the caller knows them better than the graph.
    """
    weights = parameters(gm, names)
    constant = weight_only(gm, weights)
    chains = find_chains(gm, constant)
    outs = {residual.out: residual for chain in chains for residual in chain}
    streams = [_Finder(gm, weights, constant, chain, outs).stream() for chain in chains]
    # A sum like x + c * x**3, as in a gelu written out, has the form of a residual add and is none.
    streams = [s for s in streams if any(mixes(node) for branch in s.branches for node in branch.body)]
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    streams = _within_borders(sorted(streams, key=lambda stream: -order[stream.sums[0].out]))
    streams.sort(key=lambda stream: (-len(stream.sums), order[stream.sums[0].out]))
    kept: list[ResidualStream] = []
    inside: set[fx.Node] = set()
    inner = _inner(streams)
    for stream in streams:
        if stream in inner or stream.sums[0].out in inside:
            continue  # a residual inside a branch is that branch's own affair
        kept.append(stream)
        for branch in stream.branches:
            inside |= branch.nodes
            held = sum(len(other.sums) for other in inner if other.sums[0].out in branch.nodes)
            if held and branch.reason:
                branch.reason += f", and holds {held} residual sum{'s' if held > 1 else ''} of its own"
    kept.sort(key=lambda stream: order[stream.sums[0].out])
    name_branches([branch for stream in kept for branch in stream.branches], weights, constant)
    return tuple(kept)


def _within_borders(streams: list[ResidualStream]) -> list[ResidualStream]:
    """Those of ``streams``, the last first, that do not begin outside a branch of another and end inside it.

    A mask that is added to the scores of an attention does: the scores come from all layers that it masked before.
    """
    kept: list[ResidualStream] = []
    for stream in streams:
        first, own = stream.sums[0].out, {node for branch in stream.branches for node in branch.nodes}
        around = [other for other in kept if other.sums[0].out not in own]
        if not any(first in b.nodes and not own <= b.nodes for other in around for b in other.branches):
            kept.append(stream)
    return kept


def _inner(streams: list[ResidualStream]) -> set[ResidualStream]:
    """The streams that run inside a branch of another, however long they are; of two that feed each other, neither."""
    heads = {stream.sums[0].out: stream for stream in streams}
    holds = {
        stream: {heads[node] for branch in stream.branches for node in branch.nodes if node in heads}
        for stream in streams
    }
    return {held for stream in streams for held in holds[stream] if stream not in holds[held]}


class _Finder:
    """Finds the branches of one chain of sums."""

    def __init__(
        self,
        gm: fx.GraphModule,
        weights: Mapping[fx.Node, str],
        constant: set[fx.Node],
        sums: tuple[Sum, ...],
        outs: Mapping[fx.Node, Sum],
    ) -> None:
        self._weights, self._constant, self._sums, self._outs = weights, constant, sums, outs
        self._recogniser = Recogniser(constant)
        self._order = {node: position for position, node in enumerate(gm.graph.nodes)}
        self._points: list[fx.Node] = []
        self._level: dict[fx.Node, int] = {}
        others = [term.node for term in sums[0].terms]
        self._pass(beginning(sums[0].stream.node, others, constant, self._order))
        for residual in sums[1:]:
            self._pass([*takewhile(lambda node: node not in self._level, way(residual.stream.node, constant))])
        self._pass([sums[-1].out])
        self._reads: dict[fx.Node, int] = {}
        self._computes_with: dict[fx.Node, int] = {}  # of the points read, those of which not only the sizes count
        self._sizes = sizes_only(gm.graph)
        for node in gm.graph.nodes:
            read = computed = 0
            for source in node.all_input_nodes:
                level = self._level.get(source)
                read |= self._reads[source] if level is None else 1 << level
                computed |= self._computes_with[source] if level is None else 1 << level
            self._reads[node], self._computes_with[node] = read, 0 if node in self._sizes else computed

    def _pass(self, nodes: Sequence[fx.Node]) -> None:
        """Note a part of the way of the stream, last node first: its first node is a point, and so is each factor."""
        self._level.update(dict.fromkeys(nodes, 0))  # in this order: passes take the one nearest to its sum
        for index, node in enumerate(reversed(nodes)):
            if not index or link(node) is None:
                self._points.append(node)
            self._level[node] = len(self._points) - 1

    def stream(self) -> ResidualStream:
        for residual in self._sums:
            residual.branches = self._branches(residual)
        return ResidualStream(self._sums, tuple(self._points), self._level)

    def _branches(self, residual: Sum) -> tuple[Branch, ...]:
        terms = {term.node for term in residual.terms}
        groups: list[tuple[list[Term], dict[fx.Node, None], set[fx.Node]]] = []
        for term in residual.terms:
            if not self._computes_with[term.node] or term.node in self._constant or self._is_point(term.node):
                continue
            body, foreign = self._body(term.node, terms)
            if not self._read(body, self._computes_with[term.node].bit_length() - 1):
                continue  # it depends on the stream by way of what is left of a dropped branch, and of another term
            joined = ([term], body, foreign)
            for other in [g for g in groups if _belong_together(g, joined)]:
                groups.remove(other)
                joined = (other[0] + joined[0], other[1] | joined[1], other[2] | joined[2])
            groups.append(joined)
        return tuple(self._branch(*group) for group in groups)

    def _is_point(self, node: fx.Node) -> bool:
        """Whether ``node`` is a point of the stream, times or over weights: ``x + gain * x0`` adds no branch."""
        allow = LINKS | Change.GAIN | Change.DIVISOR | Change.MASK
        return peel(node, allow, self._constant, lambda inner: inner not in self._level) in self._level

    def _body(self, contribution: fx.Node, terms: set[fx.Node]) -> tuple[dict[fx.Node, None], set[fx.Node]]:
        """The nodes that depend on the last stream point that ``contribution`` reads, and what else they take."""
        last = 1 << (self._computes_with[contribution].bit_length() - 1)
        body: dict[fx.Node, None] = {}
        foreign: set[fx.Node] = set()
        stack = [contribution]
        while stack:
            node = stack.pop()
            if node in body:
                continue
            body[node] = None
            for source in node.all_input_nodes:
                level = self._level.get(source)
                if level is not None:
                    if 1 << level != last:
                        foreign.add(source)
                elif source in terms or KEPT in source.meta:
                    foreign.add(source)
                elif self._reads[source] & last:
                    stack.append(source)
                elif self._reads[source]:
                    foreign.add(source)
        return body, foreign

    def _branch(self, terms: list[Term], body: dict[fx.Node, None], foreign: set[fx.Node]) -> Branch:
        nodes = tuple(sorted(body, key=self._order.__getitem__))
        level = max(self._computes_with[term.node].bit_length() for term in terms) - 1
        read = max(self._read(nodes, level), key=self._order.__getitem__)
        outside = foreign - {term.node for term in terms}
        ffn, gate_up = None, None
        if len(terms) > 1:
            reason = "it adds several values to the stream (an adapter, or parts that share a projection)"
        else:
            recognised = self._recogniser.ffn(terms[0].node, body.__contains__)
            ffn, reason = (None, recognised) if isinstance(recognised, str) else (recognised, "")
            gate_up = ffn.gate_up if ffn else self._recogniser.gate_up(terms[0].node, body.__contains__)
        if gate_up is not None and any(mixes(node) for node in ancestors([gate_up.normed.output], body)):
            ffn, gate_up, reason = None, None, reason or "its input is not the stream but what another layer made of it"
        if crossing := self._crossing(nodes, body):
            ffn, gate_up, reason = (
                None,
                None,
                "a sum of another residual stream is a part of it: the two feed each other",
            )
        kind = kind_of(nodes, ffn, gate_up, self._constant)
        if kind == "attention":
            gate_up, reason = None, "attention"
        elif kind == "moe":
            tied = beside(terms, nodes, self._recogniser, self._constant)
            gate_up, reason = None, f"routed experts, and an FFN: {tied}" if tied else "routed experts"
        elif ffn is None and not crossing and adapted(nodes, [term.node for term in terms], self._constant):
            reason = ADAPTED
        elif kind == "other" and is_linear_map([term.node for term in terms], nodes, self._constant, self._sizes):
            kind, reason = "linear", "a linear map, no hidden layer"
        return Branch(
            kind=kind,
            read=read,
            terms=tuple(terms),
            body=nodes,
            parameters=parameters_of(nodes, self._weights, self._constant),
            foreign=tuple(sorted(outside, key=self._order.__getitem__)),
            ffn=ffn,
            gate_up=gate_up,
            reason=reason,
            crossing=crossing,
            nodes=frozenset(body),
        )

    def _crossing(self, nodes: Sequence[fx.Node], body: Mapping[fx.Node, None]) -> tuple[fx.Node, ...]:
        """The sums of other streams among ``nodes`` that come from outside the branch, and go on outside."""
        inner = [self._outs[node] for node in nodes if node in self._outs and same_shape(node, self._points[0])]
        own = {residual.out for residual in self._sums}
        return tuple(
            residual.out
            for residual in inner
            if way(residual.stream.node, self._constant)[-1] not in body
            and any(user not in body and user not in own for user in residual.out.users)
        )

    def _read(self, nodes: Iterable[fx.Node], level: int) -> list[fx.Node]:
        """What ``nodes`` read of the stream at ``level``."""
        return [source for node in nodes for source in node.all_input_nodes if self._level.get(source) == level]


_Group = tuple[list[Term], dict[fx.Node, None], set[fx.Node]]


def _belong_together(one: _Group, other: _Group) -> bool:
    """Whether two terms of a sum are one branch: one feeds the other, they share a projection, or one is but part."""
    if any(term.node in other[2] for term in one[0]) or any(term.node in one[2] for term in other[0]):
        return True
    shared = [node for node in one[1] if node in other[1]]
    if not any(map(mixes, one[1])) or not any(map(mixes, other[1])):
        return bool(shared)
    return any(map(mixes, shared))
