"""Gains and shifts: the affine part of a norm, taken off its output so that it can be folded into what reads it.

Whatever the nesting: ``c * (gain * bare + shift)`` is ``c * gain`` times ``bare``, and a shift of ``c * shift``.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace

from torch import fx

from fxfuse.graph.ops import Op, op
from fxfuse.graph.rows import passed_on
from fxfuse.graph.scale import scaling
from fxfuse.graph.values import dtype, last_dim, product, shape

NORMS = frozenset({"rms_norm", "layer_norm"})
"""Norms that are one call, with gain and shift among its arguments."""


@dataclass(frozen=True)
class Factor:
    """What a value is multiplied with.

    Attributes:
        gains: weight-only nodes, each ``[d]`` or of one number. ``1 + w`` is such a node.
        divisors: such nodes that the value is divided by.
        number: a literal one.
    """

    gains: tuple[fx.Node, ...] = ()
    divisors: tuple[fx.Node, ...] = ()
    number: float = 1.0

    def __mul__(self, other: Factor) -> Factor:
        return Factor(self.gains + other.gains, self.divisors + other.divisors, self.number * other.number)

    @property
    def is_one(self) -> bool:
        return self == Factor()


@dataclass(frozen=True)
class Shift:
    """``factor * node``, added; ``node`` is weight-only, ``[d]`` or of one number."""

    node: fx.Node
    factor: Factor


@dataclass(frozen=True)
class Normed:
    """The input that an FFN's projections share: ``factor * bare`` and the sum of the ``shifts``.

    Attributes:
        output: the node that the projections read.
        bare: the node without factor and shifts, or the norm call that applies some itself (``fused_call``).
        factor: what ``bare`` is multiplied with on the way.
        shifts: what is added on the way, the last one first.
        steps: the nodes that multiply and add.
        fused_call: ``bare`` is a call of ``rms_norm`` or ``layer_norm`` with gain or shift among its arguments.
    """

    output: fx.Node
    bare: fx.Node
    factor: Factor = Factor()
    shifts: tuple[Shift, ...] = ()
    steps: tuple[fx.Node, ...] = ()
    fused_call: bool = False

    @property
    def weights(self) -> tuple[fx.Node, ...]:
        """The weight-only nodes of factor and shifts."""
        factors = (self.factor, *(shift.factor for shift in self.shifts))
        by = tuple(node for factor in factors for node in factor.gains + factor.divisors)
        return by + tuple(shift.node for shift in self.shifts)


def normed(
    output: fx.Node, width: int, weights: Container[fx.Node], belongs: Callable[[fx.Node], bool] = lambda _: True
) -> Normed:
    """Take the affine part off ``output``, whose last dimension is ``width``.

    Args:
        output: a node.
        width: the size of its last dimension.
        weights: the weight-only nodes.
        belongs: tells the nodes of the branch's body, so that no factor of the stream itself is taken off.
    """
    node, taken = output, Normed(output, output)
    while belongs(node) and (found := op(node)) is not None:
        source = passed_on(node, found, dtype(output))
        if source is not None:
            node = source
            continue
        if found.name in NORMS:
            return _of_call(taken, node, found, weights) or taken
        step = _step(found, width, weights)
        if step is None:
            break
        bare, factor, shift = step
        shifts = () if shift is None else (Shift(shift.node, taken.factor * shift.factor),)
        taken = Normed(output, bare, taken.factor * factor, taken.shifts + shifts, (*taken.steps, node))
        node = bare
    return taken


def _of_call(outer: Normed, node: fx.Node, found: Op, weights: Container[fx.Node]) -> Normed | None:
    """``outer`` with the gain and the shift that a norm's call applies itself, if it is over the last dimension."""
    gain, bias, sizes = found.node("weight"), found.node("bias"), found.args.get("shape")
    own = [each for each in (gain, bias) if each is not None]
    if not isinstance(sizes, list | tuple) or len(sizes) != 1 or not own or any(each not in weights for each in own):
        return None
    shifts = () if bias is None else (Shift(bias, outer.factor),)
    factor = outer.factor if gain is None else outer.factor * Factor((gain,))
    made = replace(outer, bare=node, factor=factor, shifts=outer.shifts + shifts)
    return replace(made, steps=(*outer.steps, node), fused_call=True)


def _step(found: Op, width: int, weights: Container[fx.Node]) -> tuple[fx.Node, Factor, Shift | None] | None:
    """``(x, factor, shift)`` if the op is ``factor * x`` or ``x + shift``, both of weights and numbers alone."""
    if found.name in ("add", "sub") and found.args.get("alpha", 1) == 1:
        pair = times_vector(found, width, weights, found.name) or _times_number(found, weights, found.name)
        if pair is None or (found.name == "sub" and pair[0] is not found.node("input")):
            return None
        return pair[0], Factor(), Shift(pair[1], Factor(number=1.0 if found.name == "add" else -1.0))
    if found.name in ("mul", "div"):
        pair = times_vector(found, width, weights, found.name) or _times_number(found, weights, found.name)
        if pair is not None and found.name == "mul":
            return pair[0], Factor((pair[1],)), None
        if pair is not None and pair[0] is found.node("input") and "rounding_mode" not in found.args:
            return pair[0], Factor(divisors=(pair[1],)), None
    scaled = scaling(found)
    return None if scaled is None or scaled[1].nodes else (scaled[0], Factor(number=scaled[1].number), None)


def unfoldable(affine: Normed) -> str:
    """Why gain and shift cannot be folded into what reads them exactly; an empty string if they can.

    A norm that computes in float32 inside of a float64 model rounds its product with the gain, and a folded one spares
    that rounding: over 1e-8 of difference, which no plan has asked for. In lower dtypes than the norm's it spares none.
    """
    read = dtype(affine.output)
    for step in affine.steps:
        applied = dtype(step)
        if applied is not None and read is not None and applied.itemsize < read.itemsize:
            one, other = (str(each).removeprefix("torch.") for each in (applied, read))
            reads = f"its norm applies its gain in {one} and its projections read {other}"
            return f"{reads}: to fold it would spare that rounding"
    return ""


def times_vector(
    found: Op, width: int, weights: Container[fx.Node], name: str = "mul"
) -> tuple[fx.Node, fx.Node] | None:
    """``(x, v)`` if the op is ``x * v`` (or what ``name`` says), v a weight-only vector over x's last dimension."""
    pair = with_weight(found, weights) if found.name == name else None
    if pair is None or last_dim(pair[0]) not in (None, width):
        return None
    sizes = shape(pair[1])
    return pair if sizes and sizes[-1] == width and product(sizes) == width else None


def _times_number(found: Op, weights: Container[fx.Node], name: str = "mul") -> tuple[fx.Node, fx.Node] | None:
    """``(x, v)`` if the op is ``x * v`` (or what ``name`` says), v a weight-only tensor of one number."""
    pair = with_weight(found, weights) if found.name == name else None
    sizes = shape(pair[1]) if pair is not None else None
    return pair if sizes is not None and product(sizes) == 1 else None


def with_weight(found: Op, weights: Container[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """``(x, w)`` if the op combines a value with something weight-only, in either order."""
    for one, other in (("input", "other"), ("other", "input")):
        source, weight = found.node(one), found.node(other)
        if source is not None and weight is not None and source not in weights and weight in weights:
            return source, weight
    return None
