"""Gains and shifts: the affine part of a norm, taken off its output so that it can be folded into what reads it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import fx

from fxfuse.graph.ops import Op, op
from fxfuse.graph.rows import passed_on
from fxfuse.graph.values import dtype, last_dim, product, shape

NORMS = frozenset({"rms_norm", "layer_norm"})
"""Norms that are one call, with gain and shift among its arguments."""


@dataclass(frozen=True)
class Normed:
    """The input that an FFN's projections share: ``gain * bare + shift``.

    Attributes:
        output: the node that the projections read.
        bare: the node without gain and shift, or the fused norm call that applies them itself (``fused_call``).
        gain: weight-only node ``[d]``, or of one number, or None. ``1 + w`` is such a node.
        shift: weight-only node ``[d]`` or None.
        fused_call: ``bare`` is a call of ``rms_norm`` or ``layer_norm`` with gain and shift among its arguments.
    """

    output: fx.Node
    bare: fx.Node
    gain: fx.Node | None
    shift: fx.Node | None
    fused_call: bool


def normed(output: fx.Node, width: int, weights: Container[fx.Node]) -> Normed:
    """Take the affine part off ``output``, whose last dimension is ``width``; ``weights`` are the weight-only nodes."""
    node = output
    shift: fx.Node | None = None
    while (found := op(node)) is not None:
        source = passed_on(node, found, dtype(output))
        if source is not None:
            node = source
            continue
        if found.name in NORMS and shift is None:
            gain, bias = found.node("weight"), found.node("bias")
            sizes = found.args.get("shape")
            plain = isinstance(sizes, list | tuple) and len(sizes) == 1
            own = [node for node in (gain, bias) if node is not None]
            if plain and own and all(node in weights for node in own):
                return Normed(output, node, gain, bias, True)
            break
        vector = times_vector(found, width, weights, "add") if shift is None else None
        if vector is not None and found.args.get("alpha", 1) == 1:
            node, shift = vector
            continue
        vector = times_vector(found, width, weights) or _times_number(found, weights)
        if vector is not None:
            return Normed(output, vector[0], vector[1], shift, False)
        break
    # A shift with no gain below it is no norm's bias; leave it where it is.
    return Normed(output, output, None, None, False)


def unfoldable(affine: Normed) -> str:
    """Why gain and shift cannot be folded into what reads them exactly; an empty string if they can.

    A norm that computes in float32 inside of a float64 model rounds its product with the gain, and a folded one spares
    that rounding: over 1e-8 of difference, which no plan has asked for. In lower dtypes than the norm's it spares none.
    """
    bare, read = dtype(affine.bare), dtype(affine.output)
    gain = bare if affine.gain is None else dtype(affine.gain)
    if (affine.gain is None and affine.shift is None) or bare is None or gain is None or read is None:
        return ""
    applied = bare if affine.fused_call else torch.promote_types(bare, gain)
    if applied.itemsize >= read.itemsize:
        return ""
    one, other = (str(each).removeprefix("torch.") for each in (applied, read))
    return f"its norm applies its gain in {one} and its projections read {other}: to fold it would spare that rounding"


def times_vector(
    found: Op, width: int, weights: Container[fx.Node], name: str = "mul"
) -> tuple[fx.Node, fx.Node] | None:
    """``(x, v)`` if the op is ``x * v`` (or what ``name`` says), v a weight-only vector over x's last dimension."""
    pair = with_weight(found, weights) if found.name == name else None
    if pair is None or last_dim(pair[0]) not in (None, width):
        return None
    sizes = shape(pair[1])
    return pair if sizes and sizes[-1] == width and product(sizes) == width else None


def _times_number(found: Op, weights: Container[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """``(x, v)`` if the op is ``x * v``, v a weight-only tensor of one number."""
    pair = with_weight(found, weights) if found.name == "mul" else None
    sizes = shape(pair[1]) if pair is not None else None
    return pair if sizes is not None and product(sizes) == 1 else None


def with_weight(found: Op, weights: Container[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """``(x, w)`` if the op combines a value with something weight-only, in either order."""
    for one, other in (("input", "other"), ("other", "input")):
        source, weight = found.node(one), found.node(other)
        if source is not None and weight is not None and source not in weights and weight in weights:
            return source, weight
    return None
