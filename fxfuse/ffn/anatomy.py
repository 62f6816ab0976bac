"""The shape of a feed-forward network, whatever its spelling.

``gain * down(middle(p_1(x), ..., p_n(x)))`` where every ``p_i`` is some rows of a linear map of one input, ``middle``
acts on each hidden unit alone, and ``down`` is linear. That, and only that, is what makes a sum of FFNs of one input
ONE wide FFN (arXiv 2503.18908, theorem 3.1): stack the rows of the ``p_i``, concatenate the columns of ``down``. SwiGLU
is ``middle = silu(p_1) * p_2``; the theorem does not care which function it is.

Where something stands in the way (a norm of the hidden units, or of the output), the projections can still be one GEMM.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import fx

from fxfuse.ffn.affine import NORMS, Normed, normed
from fxfuse.ffn.projection import Projection, mixes, projection
from fxfuse.ffn.quantized import Quantized, joinable, stacked
from fxfuse.graph.blocks import Blocks
from fxfuse.graph.ops import OVER_UNITS, Op, drops_randomly, is_pointwise, op
from fxfuse.graph.peel import PASSED, Change, hides_its_sizes, layer, layers
from fxfuse.graph.scale import ONE, Scale, is_number
from fxfuse.graph.sharded import Reduction, reduction
from fxfuse.graph.slices import is_last
from fxfuse.graph.special import unpackable
from fxfuse.graph.values import dtype, last_dim, product, shape
from fxfuse.graph.written import written_by

__all__ = ["FFN", "GateUp", "Normed", "Projection", "Recogniser", "mixes"]


@dataclass(frozen=True)
class GateUp:
    """The first half of a feed-forward network, of whatever form the second half is.

    Attributes:
        normed: the input of the projections.
        projections: one (plain MLP) or two (gated) in the usual cases, in the order in which they are used.
        gated: two of them meet in a product.
    """

    normed: Normed
    projections: tuple[Projection, ...]
    gated: bool

    @property
    def blocks(self) -> Blocks | None:
        """How its weights are quantized, if they are, and their rows can be joined with others."""
        found = stacked(self.projections)
        return found if isinstance(found, Blocks) else None

    @property
    def unpackable(self) -> str:
        """Why its weights cannot be packed with others; an empty string if they can."""
        found = stacked(self.projections)
        if found:
            return found if isinstance(found, str) else ""
        matrices = [node for leaf in self.projections for node in (leaf.weight, leaf.bias)]
        return unpackable([*matrices, *self.normed.weights])


@dataclass(frozen=True)
class FFN:
    """A recognised feed-forward network that can be a part of a wide one.

    Attributes:
        normed: the input of the projections.
        projections: one (plain MLP) or two (gated) in the usual cases, in the order in which ``middle`` uses them.
        middle: pointwise nodes from the projections to ``down.input``, in graph order.
        constants: weight-only nodes that ``middle`` takes, each one number for all hidden units or one for each.
        down: the projection back to the stream.
        gains: weight-only nodes that the output is multiplied with, each one number or a vector ``[d]``.
        scale: the numbers that multiply the output on its way to the stream.
        gated: two projections meet in a product.
        reduction: the all-reduce of what ``down`` makes, where the hidden units are spread over several processes.
        quantized: how its weights are quantized, if they are. No gain goes into them: only FFNs that read the very same
            value can be one.
    """

    normed: Normed
    projections: tuple[Projection, ...]
    middle: tuple[fx.Node, ...]
    constants: tuple[fx.Node, ...]
    down: Projection
    gains: tuple[fx.Node, ...]
    scale: Scale
    gated: bool
    reduction: Reduction | None = None
    quantized: Quantized | None = None

    @property
    def gate_up(self) -> GateUp:
        return GateUp(self.normed, self.projections, self.gated)


@dataclass(frozen=True)
class _Output:
    """A contribution taken apart: ``scale * gains * node``; ``outer`` is what it is before any gain is taken off.

    ``reduction`` is the all-reduce that stands between, outside of all gains: a weight that multiplies its result is
    one of each process, and need not be the same in all.
    """

    node: fx.Node
    outer: fx.Node
    gains: tuple[fx.Node, ...]
    scale: Scale
    reduction: Reduction | None


@dataclass(frozen=True)
class _Half:
    """The way back from a node to the projections that it comes from: they, and the nodes between."""

    leaves: Mapping[fx.Node, Projection]
    nodes: Collection[fx.Node]


class Recogniser:
    """Finds FFNs in a graph whose weight-only nodes are known."""

    def __init__(self, weight_only: set[fx.Node]) -> None:
        self._weights = weight_only

    def ffn(self, contribution: fx.Node, belongs: Callable[[fx.Node], bool]) -> FFN | str:
        """The FFN whose output is ``contribution``, or the reason, in words, why it is none.

        ``belongs`` tells the nodes of the branch's body, so that nothing outside is taken for a part of it.
        """
        out = self._output(contribution)
        down = projection(out.node, self._weights)
        if down is None and (unknown := _without_sizes(out.node)):
            return unknown
        if down is None:
            return f"its output is not a linear projection but {self._describe(out.outer)}"
        if down.rows is not None:
            return "its output is a part of a larger projection"
        middle: dict[fx.Node, None] = {}
        leaves: dict[fx.Node, Projection] = {}
        reason = self._middle(down.input, belongs, middle, leaves)
        if reason:
            return reason
        if not leaves:
            return "it has a single linear map, no hidden layer"
        projections = tuple(leaves.values())
        inputs = {leaf.input for leaf in projections}
        if len(inputs) > 1:
            return "its projections read different values"
        if len({leaf.width for leaf in projections}) > 1:
            return "its projections have different widths"
        ordered = (
            tuple(node for node in down.output.graph.nodes if node in middle) if len(middle) > 1 else tuple(middle)
        )
        uses = [(source, node) for node in ordered for source in node.all_input_nodes if source in self._weights]
        if not all(_one_a_unit(constant, user, projections[0].width) for constant, user in uses):
            return "its activation has parameters that are not one a hidden unit, or of another dtype"
        constants = tuple(dict.fromkeys(constant for constant, _ in uses))
        bare = normed(inputs.pop(), projections[0].fan_in, self._weights, belongs)
        matrices = [node for leaf in (*projections, down) for node in (leaf.weight, leaf.bias)]
        quantized = None
        if unpackable([*matrices, *constants, *out.gains, *bare.weights]):
            found = joinable(projections, down, out.gains, constants)
            if isinstance(found, str):
                return found
            quantized = found
        gated = _gated(_Half(leaves, middle))
        return FFN(bare, projections, ordered, constants, down, out.gains, out.scale, gated, out.reduction, quantized)

    def gate_up(self, contribution: fx.Node, belongs: Callable[[fx.Node], bool]) -> GateUp | None:
        """The first half of a branch that is an FFN but for norms and statistics over its units, or an output gate.

        Nothing in it may mix tokens, draw at random or write in place.
        """
        last = self._half(contribution, belongs)
        if last is None:
            return None
        halves = {leaf: self._half(leaf.input, belongs) for leaf in last.leaves.values()}
        deep = [half for half in halves.values() if half is not None and half.leaves]
        if len(deep) != 1:
            return None
        projections = tuple(deep[0].leaves.values())
        inputs = {leaf.input for leaf in projections}
        inputs |= {leaf.input for leaf, half in halves.items() if half is not deep[0]}  # of gates on the output
        if len(inputs) > 1:
            return None
        bare = normed(inputs.pop(), projections[0].fan_in, self._weights, belongs)
        return GateUp(bare, projections, _gated(deep[0]))

    def _output(self, contribution: fx.Node) -> _Output:
        """Take off what multiplies a contribution: numbers, and weights of one value or of one a channel."""
        node, outer, scale, how = contribution, None, ONE, None
        gains: list[fx.Node] = []
        allow = PASSED | Change.NUMBER | Change.GAIN | Change.REDUCE
        for taken in layers(contribution, allow, self._weights, read=dtype(contribution)):
            if taken.change is Change.REDUCE:
                found = reduction(taken.node)
                if gains or how is not None or found is None:
                    break
                how = found[1]
            node, scale = taken.source, scale * taken.scale
            if taken.weight is not None:
                outer = outer or taken.node
                gains.append(taken.weight)
        return _Output(node, outer or node, tuple(gains), scale, how)

    def _middle(
        self,
        node: fx.Node,
        belongs: Callable[[fx.Node], bool],
        middle: dict[fx.Node, None],
        leaves: dict[fx.Node, Projection],
    ) -> str:
        """Walk back from the hidden units to the projections; the reason why not, or an empty string."""
        stack = [node]
        while stack:
            node = stack.pop()
            if node in middle or node in leaves or node in self._weights:
                continue
            if is_number(node):
                return f"its activation takes a symbolic number ({node.name}); compile without dynamic=True"
            if not belongs(node):
                return f"its hidden units depend on {node.name}, which is not a projection of its input"
            leaf = projection(node, self._weights)
            if leaf is not None:
                leaves[node] = leaf
                continue
            call = op(node)
            if unknown := _without_sizes(node):
                return unknown
            if (write := written_by(node)) is not None:
                return f"its hidden units are edited in place ({write.name})"
            if call is None or not (is_pointwise(call) or layer(node, Change.ROWS)):
                return f"between its projections stands {self._describe(node)}, which mixes units or tokens"
            if drops_randomly(call):
                return f"dropout with p={call.args.get('p', 0.5)} is active inside it (training mode)"
            if call.inplace:
                return f"it writes in place ({node.name})"
            middle[node] = None
            # Reversed, so that the first operand's projection is found first.
            stack.extend(reversed(_read(node)))
        return ""

    def _half(self, node: fx.Node, belongs: Callable[[fx.Node], bool]) -> _Half | None:
        """Walk back to the next projections, through all that leaves tokens apart; None if something else is met."""
        leaves: dict[fx.Node, Projection] = {}
        nodes: dict[fx.Node, None] = {}
        stack = [node]
        while stack:
            node = stack.pop()
            if node in nodes or node in leaves or not belongs(node):
                continue
            leaf = projection(node, self._weights)
            if leaf is not None:
                leaves[node] = leaf
                continue
            call = op(node)
            if call is None or not leaves_tokens_apart(node, call):
                return None
            nodes[node] = None
            stack.extend(reversed(_read(node)))
        return _Half(leaves, nodes)

    def _describe(self, node: fx.Node) -> str:
        call = op(node)
        if (write := written_by(node)) is not None:
            return f"edited in place ({write.name})"
        if call is not None and call.name in NORMS:
            return "a norm (sandwich or post-norm)"
        if call is not None and drops_randomly(call):
            return f"dropout with p={call.args.get('p', 0.5)}, which is active (training mode)"
        affine = layer(node, Change.GAIN | Change.SHIFT, self._weights)
        if affine is not None and affine.weight is not None and last_dim(affine.weight) == last_dim(node):
            inner = op(self._output(affine.source).outer)
            norm = inner is not None and (inner.name in NORMS or inner.name in ("mul", "div"))
            return "a norm (sandwich or post-norm)" if norm else "scaled per channel"
        if call is not None and call.name == "mul" and len(node.all_input_nodes) == 2:
            return f"a product of two values ({node.name}), as of a gate on the output"
        name = call.name if call is not None else str(getattr(node.target, "__name__", node.target))
        return f"{name} ({node.name})"


def _without_sizes(node: fx.Node) -> str:
    """Why ``node`` cannot be judged, if the graph lacks its sizes."""
    hidden = hides_its_sizes(node)
    return f"the graph does not tell the sizes of {node.name}; give the pass example inputs" if hidden else ""


def _read(node: fx.Node) -> list[fx.Node]:
    """The values that ``node`` computes with; the sizes that a view is given are none."""
    view = layer(node, Change.ROWS)
    return node.all_input_nodes if view is None else [view.source]


def _one_a_unit(constant: fx.Node, user: fx.Node, width: int) -> bool:
    """Whether a weight that an activation takes is one number, or one for each hidden unit.

    A number without dimensions has to be of the dtype at hand, because it would not promote what a vector would.
    """
    sizes, rank = shape(constant), len(shape(user) or (width,))
    if sizes is None or len(sizes) > rank:
        return False
    if not sizes:
        others = [source for source in user.all_input_nodes if source is not constant]
        return dtype(constant) is not None and any(dtype(other) == dtype(constant) for other in others)
    return product(sizes) == 1 or (sizes[-1] == width and product(sizes) == width)


def leaves_tokens_apart(node: fx.Node, call: Op) -> bool:
    """Whether ``node`` is pointwise, or mixes the features of each token alone, and neither draws nor writes."""
    if drops_randomly(call) or call.inplace:
        return False
    if call.name in NORMS:
        sizes = call.args.get("shape")
        return isinstance(sizes, list | tuple) and len(sizes) == 1
    if call.name in OVER_UNITS:
        dim, source = call.args.get("dim"), call.node("input")
        dims = dim if isinstance(dim, list | tuple) else (dim,)
        return len(dims) == 1 and source is not None and is_last(dims[0], source)
    return is_pointwise(call) or layer(node, Change.ROWS | Change.REDUCE) is not None


def _gated(half: _Half) -> bool:
    """Whether two projections meet in a product."""
    for node in half.nodes:
        call = op(node)
        if call is not None and call.name == "mul" and len(node.all_input_nodes) == 2:
            first, second = (_uses(source, half) for source in node.all_input_nodes)
            if first - second and second - first:
                return True
    return False


def _uses(node: fx.Node, half: _Half) -> set[fx.Node]:
    """The projections that ``node`` depends on."""
    used: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node in half.leaves:
            used.add(node)
        elif node in half.nodes and node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return used
