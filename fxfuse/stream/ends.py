"""The two ends of a branch: the value that its first projections read, and the one projection that it ends in.

Between them an attention computes its scores. A branch that is nothing but its ends, ``W norm(x) + b``, is one linear
map of each token.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from fxfuse.ffn.anatomy import leaves_tokens_apart
from fxfuse.ffn.projection import Projection, mixes, projection
from fxfuse.graph.ancestors import ancestors
from fxfuse.graph.ops import OVER_UNITS, drops_randomly, op
from fxfuse.graph.peel import TABLE, Change, peel
from fxfuse.graph.value_numbering import Numbering
from fxfuse.graph.values import last_dim, value

_OF_A_NORM = frozenset({*TABLE, *OVER_UNITS, "rms_norm", "layer_norm", "pow", "square", "sqrt", "rsqrt", "reciprocal"})
"""What a norm, gains, scales and idle dropout are written with. No activation is among them."""


@dataclass(frozen=True)
class Ends:
    """Where a branch begins and where it ends.

    Attributes:
        read: what its first projections read, as each of them takes it: views of ``input``.
        input: the value behind those views, ``[..., width]``.
        before: the nodes that compute it from the stream, in graph order.
        output: the last projection.
        product: its node, without a bias that is added in a second step.
        source: what that one reads, as it takes it.
        width: the last dimension of ``input``.
    """

    read: tuple[fx.Node, ...]
    input: fx.Node
    before: tuple[fx.Node, ...]
    output: Projection
    product: fx.Node
    source: fx.Node
    width: int


def ends_of(
    terms: Sequence[fx.Node],
    body: Sequence[fx.Node],
    points: Collection[fx.Node],
    weights: Container[fx.Node],
    sizes: Container[fx.Node],
) -> Ends | str:
    """The ends of a branch, or the reason, in words, why they cannot be told.

    Args:
        terms: what it adds to the stream.
        body: its nodes, in graph order.
        points: the nodes of the stream.
        weights: the weight-only nodes.
        sizes: the nodes that tell no value but sizes.
    """
    if len(terms) > 1:
        return "it adds several values to the stream"
    last = last_products(terms[0], frozenset(body))
    output = projection(last[0], weights) if len(last) == 1 else None
    call = op(last[0]) if len(last) == 1 else None
    source = call.node("input") if call is not None else None
    if output is None or output.rows is not None or source is None:
        names = ", ".join(node.name for node in last) or "no product with weights"
        return f"it does not end in one linear projection but in {names}"
    computed = _computed(body, points, sizes)
    first = _first_products(computed)
    taken = (operand for node in first for operand in node.all_input_nodes)
    read = tuple(dict.fromkeys(operand for operand in taken if operand not in weights and operand not in sizes))
    inputs = list(dict.fromkeys(peel(node, Change.ROWS, within=lambda inner: inner not in points) for node in read))
    if not _all_equal(inputs, points):
        return "its first projections read different values: " + ", ".join(node.name for node in inputs)
    held = inputs[0]
    if gated := _gated(held, read, body, weights):
        return f"what its projections read is no norm of the stream: {gated.name} is that times what it projects"
    within = ancestors([held], set(computed))
    before = tuple(node for node in body if node in within)
    if mixing := next((node for node in before if not _leaves_tokens_apart(node)), None):
        return f"what its projections read is no norm of the stream: {mixing.name} is a part of it"
    width = last_dim(held)
    if not isinstance(width, int) or value(source) is None:
        return f"the graph does not tell the sizes of {held.name}; give the pass example inputs"
    return Ends(read, held, before, output, last[0], source, width)


def _gated(
    held: fx.Node, read: Sequence[fx.Node], body: Sequence[fx.Node], weights: Container[fx.Node]
) -> fx.Node | None:
    """The value by which alone all else reads ``held``, and which is made of it both with a product and without one.

    The first projections are a gate's then, and a part of the norm.
    """
    reached, straight = {held, *read}, {held, *read}
    places = {node: place for place, node in enumerate(body)}
    furthest = -1
    for place, node in enumerate(body):
        if node in reached or not (sources := reached.intersection(node.all_input_nodes)):
            continue
        if mixes(node) and projection(node, weights) is None:
            return None  # tokens meet here
        reached.add(node)
        if not mixes(node) and not straight.isdisjoint(sources):
            straight.add(node)
        uses = (places.get(user, len(body)) for source in (*sources, held) for user in source.users)
        furthest = max(furthest, *uses)
        if furthest == place and node in straight:
            return node
    return None


def is_linear_map(
    terms: Sequence[fx.Node], body: Sequence[fx.Node], weights: Container[fx.Node], sizes: Container[fx.Node]
) -> bool:
    """Whether a branch is ``W norm(x) + b``, perhaps with what may follow it in an attention.

    That is a norm, gains, numbers or dropout.
    """
    products = [node for node in body if mixes(node)]
    if len(terms) != 1 or len(products) != 1:
        return False
    only = projection(products[0], weights)
    rest = [node for node in body if node is not products[0] and node not in sizes]
    return only is not None and only.rows is None and all(map(_is_of_a_norm, rest))


def _all_equal(nodes: Sequence[fx.Node], points: Collection[fx.Node]) -> bool:
    """Whether nodes compute one value: a norm may be written anew for each who reads it."""
    if len(nodes) == 1:
        return True  # as nearly always, and without a walk
    numbers = Numbering({point: point for point in points})
    return len({numbers[node] for node in nodes}) == 1


def last_products(node: fx.Node, inside: Container[fx.Node]) -> list[fx.Node]:
    """The matrix products that ``node`` is computed from with no other one in between."""
    products: list[fx.Node] = []
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        if mixes(node):
            products.append(node)
            continue
        new = [source for source in node.all_input_nodes if source in inside and source not in seen]
        seen.update(new)
        stack.extend(new)
    return products


def _computed(body: Sequence[fx.Node], points: Container[fx.Node], sizes: Container[fx.Node]) -> list[fx.Node]:
    """The nodes of a branch that are computed from values of the stream, and not from its sizes alone."""
    computed: dict[fx.Node, None] = {}
    for node in body:
        if node not in sizes and any(source in computed or source in points for source in node.all_input_nodes):
            computed[node] = None
    return list(computed)


def _first_products(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The matrix products among ``nodes``, which are in graph order, that depend on no other one."""
    products: list[fx.Node] = []
    after: set[fx.Node] = set()
    for node in nodes:
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
        elif mixes(node):
            products.append(node)
            after.add(node)
    return products


def _leaves_tokens_apart(node: fx.Node) -> bool:
    call = op(node)
    return call is not None and leaves_tokens_apart(node, call)


def _is_of_a_norm(node: fx.Node) -> bool:
    call = op(node)
    if call is None or call.name not in _OF_A_NORM:
        return False
    return drops_randomly(call) or leaves_tokens_apart(node, call)
