"""Steps: what a stream goes through between two residual sums.

Casts, views of rows and idle dropout leave it what it is (:func:`link`). A :func:`factor` makes another value of it, by
numbers or weights: ``c * h`` where the model scales its stream. What was added before is scaled with it, and what is
added after is not, so the two sides of a factor are different points of the stream.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from torch import fx

from fxfuse.ffn.affine import with_weight
from fxfuse.graph.ops import Op, drops_randomly, mutated_arguments, op
from fxfuse.graph.rows import viewed
from fxfuse.graph.scale import scaling
from fxfuse.graph.values import is_floating, last_dim, product, same_shape, shape, widens


def link(node: fx.Node) -> fx.Node | None:
    """What ``node`` is but a cast, a view of rows or an idle dropout of: the stream passes these between sums."""
    found = op(node)
    if found is None:
        return None
    source = found.node("input")
    if source is None:
        return None
    if not same_shape(source, node):
        return viewed(node, found)
    if found.name in ("cast", "contiguous", "clone", "view") or (found.name == "dropout" and not drops_randomly(found)):
        return source
    return None


def factor(node: fx.Node, constant: Container[fx.Node]) -> fx.Node | None:
    """``x``, if ``node`` is ``c * x``, ``x / c``, ``x + v`` or ``x - v``.

    ``c`` is a number, and ``c`` and ``v`` are ``constant``, which depends on weights alone: one number, or a vector
    over the last dimension.
    """
    found = op(node)
    if found is None or node in constant or mutated_arguments(node) or not is_floating(node):
        return None
    number = scaling(found)
    source = number[0] if number is not None else _times_weight(node, found, constant)
    return source if source is not None and source not in constant and same_shape(source, node) else None


def _times_weight(node: fx.Node, found: Op, constant: Container[fx.Node]) -> fx.Node | None:
    """The operand of a product, quotient, sum or difference that is no weight, if the other is a small one."""
    pair = with_weight(found, constant) if found.name in ("mul", "div", "add", "sub") else None
    sizes = shape(pair[1]) if pair is not None else None
    if pair is None or sizes is None or (found.name == "div" and pair[0] is not found.node("input")):
        return None
    return pair[0] if product(sizes) == 1 or (product(sizes) == sizes[-1] == last_dim(node)) else None


def before(node: fx.Node, constant: Container[fx.Node]) -> fx.Node | None:
    """The value that ``node`` is a :func:`link` or a :func:`factor` of."""
    source = link(node)
    return factor(node, constant) if source is None else source


def way(node: fx.Node, constant: Container[fx.Node]) -> list[fx.Node]:
    """``node``, what it is a link or a factor of, and so on back."""
    found = [node]
    while (source := before(found[-1], constant)) is not None:
        found.append(source)
    return found


def unlinked(node: fx.Node) -> fx.Node:
    """``node`` before all that :func:`link` sees through."""
    while (source := link(node)) is not None:
        node = source
    return node


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
