"""Gains and shifts: the affine part of a norm, taken off its output so that it can be folded into what reads it.

Whatever the nesting: ``c * (gain * bare + shift)`` is ``c * gain`` times ``bare``, and a shift of ``c * shift``.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace

from torch import fx

from fxfuse.graph.ops import Op, op
from fxfuse.graph.peel import PASSED, Change, Layer, layers
from fxfuse.graph.values import dtype

NORMS = frozenset({"rms_norm", "layer_norm"})
"""Norms that are one call, with gain and shift among its arguments."""

_FOLDED = Change.NUMBER | Change.GAIN | Change.DIVISOR | Change.SHIFT


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
    for layer in layers(output, PASSED | _FOLDED, weights, width, dtype(output), belongs):
        if layer.scale.nodes:
            return taken
        node = layer.source
        if layer.change in _FOLDED:
            taken = _without(taken, layer)
    found = op(node) if belongs(node) else None
    return _of_call(taken, node, found, weights) or taken if found is not None and found.name in NORMS else taken


def _without(outer: Normed, layer: Layer) -> Normed:
    """``outer`` with one more multiplication or addition taken off."""
    factor, shifts, weight = outer.factor * Factor(number=layer.scale.number), outer.shifts, layer.weight
    if weight is not None and layer.change is Change.GAIN:
        factor *= Factor((weight,))
    elif weight is not None and layer.change is Change.DIVISOR:
        factor *= Factor(divisors=(weight,))
    elif weight is not None:
        shifts += (Shift(weight, outer.factor * Factor(number=layer.share)),)
    return Normed(outer.output, layer.source, factor, shifts, (*outer.steps, layer.node))


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
