"""Parts of a model: some branches of its stream cut out of its graph, as a small graph that can be compiled and timed.

A part computes ``h + a(h) + b(h)``: its branches read one point. Its weights, caches and tables are its inputs, so that
one compiled part serves every layer of the same shapes, with that layer's own weights.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxfuse.backend.frontend import Captured
from fxfuse.graph.constant import weight_only
from fxfuse.graph.order import written_memory
from fxfuse.graph.rerun import Program
from fxfuse.graph.values import parameters, shape, value
from fxfuse.passes.linear import linear_places
from fxfuse.passes.pipeline import edit
from fxfuse.plan import Plan
from fxfuse.stream.branch import Branch, Term
from fxfuse.stream.finder import ResidualStream, find_streams


@dataclass(frozen=True)
class Part:
    """Branches cut out of a graph.

    Attributes:
        gm: computes the stream with what the branches add to it, and whatever else they compute that others read.
        sources: the nodes of the whole graph whose values are its inputs, in order.
        key: equal for two parts that compute the same of inputs of the same shapes.
    """

    gm: fx.GraphModule
    sources: tuple[fx.Node, ...]
    key: Hashable


class Cutter:
    """A graph of a model that parts are cut out of.

    Attributes:
        streams: its residual streams, with their branches.
        linear: the names of attentions that are linear maps in this graph.

    Args:
        captured: the graph; it is used up.
        linear: whether the attentions that can be are made linear maps first; what those hold is no matter.
    """

    def __init__(self, captured: Captured, linear: bool = False) -> None:
        self._gm, self._inputs = captured.gm, captured.inputs
        places = linear_places(self._gm, captured.names) if linear else {}
        self.linear = frozenset(places)
        maps = {name: own for name, own in places.items() if own is not None}
        edit(self._gm, Plan(linear=tuple(places)), names=captured.names, strict=True, maps=maps)
        self.streams: tuple[ResidualStream, ...] = find_streams(self._gm, captured.names)
        self._constant = weight_only(self._gm, parameters(self._gm, captured.names))
        self._order = {node: index for index, node in enumerate(self._gm.graph.nodes)}
        self._outputs = set(self._gm.graph.output_node().all_input_nodes)

    def part(self, branches: Sequence[Branch]) -> Part:
        """The part that these branches are when they all read the point that the first one reads."""
        body = self._body(branches)
        inside = set(body)
        point = branches[0].read
        reads = {branch.read for branch in branches}
        outside = dict.fromkeys(s for node in body for s in node.all_input_nodes if s not in inside and s not in reads)
        factors = (node for branch in branches for term in branch.terms for node in term.scale.nodes)
        outside |= dict.fromkeys(node for node in factors if node not in inside)
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for node in (point, *outside):
            new[node] = graph.placeholder(node.name)
            new[node].meta = dict(node.meta)
            if (held := value(node)) is not None:
                new[node].meta["example_value"] = held
        new |= dict.fromkeys(reads, new[point])
        for node in body:
            new[node] = graph.node_copy(node, new.__getitem__)
        total = new[point]
        for branch in branches:
            for term in branch.terms:
                total = _like(graph.call_function(operator.add, (total, _scaled(graph, term, new))), total)
        added = {term.node for branch in branches for term in branch.terms}
        seen = [node for node in body if node not in added and _leaves(node, inside)]
        graph.output((total, *map(new.__getitem__, seen)))
        made = fx.GraphModule(self._gm, graph)
        return Part(made, (point, *outside), _key(made))

    def values(self, nodes: Sequence[fx.Node]) -> Mapping[fx.Node, object]:
        """The values of ``nodes`` in the call that the graph was captured from."""
        with torch.no_grad():
            return Program(self._gm).run(self._inputs, set(nodes))[1]

    def cache_bytes(self, branch: Branch) -> int:
        """Bytes of the KV cache that the branch alone keeps, in the captured call: what it returns, or writes to."""
        written = written_memory(self._gm.graph)
        held = {node for node in branch.body if node in self._outputs}
        sources = (source for node in branch.body for source in node.all_input_nodes)
        held |= {node for node in sources if node.op == "placeholder" and node in written}
        return sum(size_of(node) for node in held)

    def parameter_bytes(self, branch: Branch) -> int:
        """Bytes of the branch's weights."""
        return sum(map(size_of, branch.parameters))

    def unit_bytes(self, branch: Branch) -> int:
        """Bytes of the weights of one hidden unit, of an FFN that tells them apart; 0 of all else."""
        if branch.ffn is None:
            return 0
        known = value(branch.ffn.down.weight)
        item = 0 if known is None else known.element_size()
        rows = sum(each.fan_in + (each.bias is not None) for each in branch.ffn.projections)
        return item * (rows + branch.ffn.down.width)

    def _body(self, branches: Sequence[Branch]) -> list[fx.Node]:
        """The branches' nodes, and what they compute of weights alone or take that is no tensor, in graph order."""
        found = {node for branch in branches for node in branch.body}
        stack = list(found)
        while stack:
            for source in stack.pop().all_input_nodes:
                own = source in self._constant or value(source) is None
                if own and source not in found and source.op not in ("placeholder", "get_attr"):
                    found.add(source)
                    stack.append(source)
        return sorted(found, key=self._order.__getitem__)


def size_of(node: fx.Node) -> int:
    """Bytes of the tensor that ``node`` stands for; 0 if it is none."""
    held = value(node)
    return 0 if held is None else held.numel() * held.element_size()


def _leaves(node: fx.Node, inside: set[fx.Node]) -> bool:
    return isinstance(value(node), Tensor) and any(user not in inside for user in node.users)


def _scaled(graph: fx.Graph, term: Term, new: Mapping[fx.Node, fx.Node]) -> fx.Node:
    made = new[term.node]
    factors: list[fx.Node | float] = [new[node] for node in term.scale.nodes]
    for factor in factors if term.scale.number == 1.0 else [*factors, term.scale.number]:
        made = _like(graph.call_function(operator.mul, (made, factor)), made)
    return made


def _like(node: fx.Node, other: fx.Node) -> fx.Node:
    """``node``, known to be of the shape and dtype of ``other``."""
    node.meta["example_value"] = value(other)
    return node


def _key(gm: fx.GraphModule) -> Hashable:
    """The graph written out, without the names of its nodes."""
    number = {node: index for index, node in enumerate(gm.graph.nodes)}

    def written(argument: object) -> Hashable:
        if isinstance(argument, fx.Node):
            return number[argument]
        if isinstance(argument, list | tuple):
            return tuple(map(written, argument))
        if isinstance(argument, dict):
            return tuple((name, written(each)) for name, each in argument.items())
        return repr(argument)

    def line(node: fx.Node) -> Hashable:
        held = value(node)
        kind = None if held is None else (shape(node), held.dtype, held.device)
        target = "" if node.op == "placeholder" else str(node.target)
        return node.op, target, written(node.args), written(node.kwargs), kind

    return tuple(line(node) for node in gm.graph.nodes)
