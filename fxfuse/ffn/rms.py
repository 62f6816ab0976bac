"""RMS norms, as one call or written out: ``x / sqrt(mean(x^2) + eps)`` over the last dimension."""

from __future__ import annotations

from torch import fx

from fxfuse.ffn.affine import Normed
from fxfuse.graph.ops import Op, op
from fxfuse.graph.peel import Change, layers, peel
from fxfuse.graph.slices import is_last
from fxfuse.graph.values import dtype


def rms(normed: Normed) -> tuple[fx.Node, float] | None:
    """``(x, eps)`` if what is left of a norm without gain and shift is ``x * rsqrt(mean(x^2, -1) + eps)``.

    Casts in between may only widen: what was narrowed is another x.
    """
    node = normed.bare
    for cast in layers(node, Change.WIDEN, read=dtype(normed.output)):
        node = cast.source
    call = op(node)
    if call is None:
        return None
    if call.name == "rms_norm":
        sizes, eps, source = call.args.get("shape"), call.args.get("eps"), call.node("input")
        plain = (
            isinstance(sizes, list | tuple) and len(sizes) == 1 and call.node("weight") in (None, *normed.factor.gains)
        )
        return (source, float(eps)) if plain and source is not None and isinstance(eps, int | float) else None
    if call.name not in ("mul", "div"):
        return None
    one, other = call.node("input"), call.node("other")
    for value, factor in ((one, other), (other, one)) if call.name == "mul" else ((one, other),):
        if value is None or factor is None:
            continue
        source, eps = peel(value, Change.WIDEN), _eps_of(factor, "rsqrt" if call.name == "mul" else "sqrt", value)
        if eps is not None:
            return source, eps
    return None


def _eps_of(factor: fx.Node, root: str, value: fx.Node) -> float | None:
    """eps, if ``factor`` is the ``root`` of ``mean(value^2) + eps``."""
    call = op(factor)
    inside = call.node("input") if call is not None and call.name == root else None
    shifted = op(inside) if inside is not None else None
    if shifted is None or shifted.name != "add" or shifted.args.get("alpha", 1) != 1:
        return None
    pair = shifted.args.get("input"), shifted.args.get("other")
    for mean, eps in (pair, pair[::-1]):
        if isinstance(mean, fx.Node) and isinstance(eps, int | float) and _is_mean_square(mean, value):
            return float(eps)
    return None


def _is_mean_square(node: fx.Node, value: fx.Node) -> bool:
    call = op(node)
    squares = call.node("input") if call is not None and call.name == "mean" else None
    if call is None or squares is None or call.args.get("keepdim") is not True:
        return False
    dim = call.args.get("dim")
    dims = dim if isinstance(dim, list | tuple) else (dim,)
    squared = op(squares)
    base = _squared(squared) if squared is not None else None
    return len(dims) == 1 and is_last(dims[0], squares) and base is not None and (
        peel(base, Change.WIDEN) is peel(value, Change.WIDEN)
    )  # fmt: skip


def _squared(call: Op) -> fx.Node | None:
    """What the op is the square of."""
    source = call.node("input")
    if call.name == "square" or (call.name == "pow" and call.args.get("exponent") in (2, 2.0)):
        return source
    return source if call.name == "mul" and source is call.node("other") else None
