"""Recipes: how the packed weights that a rewrite wrote into a graph are made, taken out of the graph.

A rewrite leaves its packed weights as marked expressions (:mod:`fxfuse.packing.expressions`). Here the graph gets an
input for each, and what is needed to compute that input's value from the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor, fx

from fxfuse._torch.sources import mark_static
from fxfuse.graph.ancestors import ancestors
from fxfuse.graph.blocks import join
from fxfuse.graph.surgery import transaction
from fxfuse.graph.values import value
from fxfuse.packing.expressions import PACK
from fxfuse.packing.strategy import strategy_of


@dataclass(frozen=True)
class Part:
    """One expression of weights, ``compute(members)``; ``member`` is set if it is nothing but that member itself.

    ``uses`` are the places of the members that it reads.
    """

    compute: Callable[[Sequence[Tensor]], Tensor]
    member: int | None
    uses: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """How one packed tensor is made: its parts side by side along ``dim``.

    ``inputs`` are the positions, among the graph's inputs, of the weights that are its members, in order.
    ``key`` is equal for two recipes that do the same to their members, in whatever graphs they stand.
    """

    what: str
    inputs: tuple[int, ...]
    parts: tuple[Part, ...]
    dim: int
    key: Hashable

    def __call__(self, members: Sequence[Tensor]) -> Tensor:
        """The packed tensor, in memory of its own."""
        made = [part.compute(members) for part in self.parts]
        return strategy_of(made, "copy").join(made, self.dim)


def extract(gm: fx.GraphModule) -> tuple[Recipe, ...]:
    """Replace every marked expression of ``gm`` by a new input, after those it has; how to make their values, in order.

    An expression of weights that are not inputs of the graph (attributes of a GraphModule) stays in it.
    """
    with transaction(gm):
        return tuple(_extract(gm))


def _extract(gm: fx.GraphModule) -> list[Recipe]:
    positions = {node: index for index, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    last = list(positions)[-1] if positions else None
    recipes: list[Recipe] = []
    marked = {node: ancestors([node]) for node in gm.graph.nodes if PACK in node.meta}
    for root, inside in marked.items():
        outer = frozenset().union(*(nodes for other, nodes in marked.items() if other is not root and root in nodes))
        if root.users and root.users.keys() <= outer:
            continue  # the units of an FFN that became a part of a wide one
        members = [node for node in positions if node in inside]
        if any(node.op == "get_attr" for node in inside) or last is None:
            continue
        parts, dim = (root.args[0], root.args[1]) if root.target in (torch.cat, join) else ([root], 0)
        assert isinstance(parts, list | tuple) and isinstance(dim, int)
        recipes.append(
            Recipe(
                what=str(root.meta[PACK]),
                inputs=tuple(positions[node] for node in members),
                parts=tuple(_part(part, members) for part in parts if isinstance(part, fx.Node)),
                dim=dim,
                key=(dim, tuple(_expression(part, members) for part in parts if isinstance(part, fx.Node))),
            )
        )
        with gm.graph.inserting_after(last):
            made = gm.graph.placeholder(f"packed_{len(recipes) - 1}")
        made.target = made.name  # the graph may have had a node of that name, and made this one's another
        mark_static(made)
        if (known := value(root)) is not None:
            made.meta["example_value"] = known
        last = made
        root.replace_all_uses_with(made, lambda user, outer=outer: user not in outer)
        for node in reversed([below for below in gm.graph.nodes if below in inside]):
            if not node.users and node.op not in ("placeholder", "output"):
                gm.graph.erase_node(node)
    return recipes


def _part(root: fx.Node, members: Sequence[fx.Node]) -> Part:
    """``root`` as a function of all ``members``."""
    if root in members:
        index = members.index(root)
        return Part(itemgetter(index), index, (index,))
    graph = fx.Graph()
    new = {member: graph.placeholder(f"weight_{index}") for index, member in enumerate(members)}
    inside = ancestors([root])
    for node in root.graph.nodes:
        if node in inside and node not in new:
            new[node] = graph.node_copy(node, new.__getitem__)
            new[node].meta = {}
    graph.output(new[root])
    run = fx.GraphModule({}, graph)
    uses = tuple(index for index, member in enumerate(members) if member in inside)
    return Part(lambda weights: run(*weights), None, uses)


def _expression(node: fx.Node, members: Sequence[fx.Node]) -> Hashable:
    """``node`` written out, for comparison with expressions of other graphs."""
    if node in members:
        return members.index(node)

    def freeze(value: object) -> Hashable:
        if isinstance(value, fx.Node):
            return _expression(value, members)
        if isinstance(value, list | tuple):
            return tuple(freeze(item) for item in value)
        return repr(value)

    return (node.op, str(node.target), freeze(node.args), freeze(tuple(node.kwargs.items())))
