"""Steps: what a stream goes through between two residual sums.

Casts, views of rows and idle dropout leave it what it is (:func:`link`). A factor makes another value of it, by a
number or a weight of one number or one a channel: ``c * h`` where the model scales its stream. What was added before is
scaled with it, and what is added after is not, so the two sides of a factor are different points of the stream.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from torch import fx

from fxfuse.graph.ops import mutated_arguments
from fxfuse.graph.peel import PASSED, Change, layer
from fxfuse.graph.values import is_floating, same_shape, widens

LINKS = PASSED | Change.ROUND
FACTORS = Change.NUMBER | Change.GAIN | Change.DIVISOR | Change.SHIFT


def link(node: fx.Node) -> fx.Node | None:
    """The input of ``node``, if it only casts, copies or regroups rows, or is idle dropout."""
    taken = layer(node, LINKS)
    return None if taken is None else taken.source


def before(node: fx.Node, constant: Container[fx.Node]) -> fx.Node | None:
    """The input of ``node``, if it is a :func:`link` or a factor; ``constant`` depends on weights alone."""
    taken = layer(node, LINKS | FACTORS, constant)
    if taken is None or taken.change in LINKS:
        return None if taken is None else taken.source
    pure = is_floating(node) and not mutated_arguments(node)
    return taken.source if pure and same_shape(taken.source, node) else None


def way(node: fx.Node, constant: Container[fx.Node]) -> list[fx.Node]:
    """``node``, what it is a link or a factor of, and so on back."""
    nodes = [node]
    while (source := before(nodes[-1], constant)) is not None:
        nodes.append(source)
    return nodes


def keeps(total: fx.Node, node: fx.Node) -> bool:
    """Whether ``total`` is as wide as all that ``node`` is a :func:`link` of."""
    source: fx.Node | None = node
    while source is not None and widens(source, total):
        source = link(source)
    return source is None


def beginning(
    stream: fx.Node, others: Sequence[fx.Node], constant: Container[fx.Node], order: Mapping[fx.Node, int]
) -> list[fx.Node]:
    """The first points of a stream, seen from its first sum: ``stream``, and what that is a link or a factor of.

    Through links that ends at the last one that others read too: before a cast to float32, say, the first branch reads
    it. Through factors, at the first one that the ``others`` of the sum are computed from: in ``c * h + f(h)`` that is
    ``h``, but the scale of an embedding is no part of the stream.
    """
    nodes = way(stream, constant)
    read = _read(others, nodes, order) if any(link(node) is None for node in nodes[:-1]) else set()
    start = next((index for index, node in enumerate(nodes) if node in read), 0)
    end = start
    for index in range(start + 1, len(nodes)):
        if link(nodes[index - 1]) is None:
            break
        end = index if len(nodes[index].users) > 1 else end
    return nodes[: end + 1]


def _read(values: Sequence[fx.Node], points: Sequence[fx.Node], order: Mapping[fx.Node, int]) -> set[fx.Node]:
    """Those of ``points``, the last one first, that ``values`` are computed from by no way through another."""
    found: set[fx.Node] = set()
    seen, stack, earliest = set(values), list(values), order[points[-1]]
    while stack:
        node = stack.pop()
        if node in points:
            found.add(node)
            continue
        new = [source for source in node.all_input_nodes if source not in seen and order[source] >= earliest]
        seen.update(new)
        stack.extend(new)
    return found
