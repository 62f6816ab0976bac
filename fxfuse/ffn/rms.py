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
    found = op(node)
    if found is None:
        return None
    if found.name == "rms_norm":
        sizes, eps, source = found.args.get("shape"), found.args.get("eps"), found.node("input")
        plain = (
            isinstance(sizes, list | tuple) and len(sizes) == 1 and found.node("weight") in (None, *normed.factor.gains)
        )
        return (source, float(eps)) if plain and source is not None and isinstance(eps, int | float) else None
    if found.name not in ("mul", "div"):
        return None
    one, other = found.node("input"), found.node("other")
    for value, factor in ((one, other), (other, one)) if found.name == "mul" else ((one, other),):
        if value is None or factor is None:
            continue
        source, eps = peel(value, Change.WIDEN), _eps_of(factor, "rsqrt" if found.name == "mul" else "sqrt", value)
        if eps is not None:
            return source, eps
    return None


def _eps_of(factor: fx.Node, root: str, value: fx.Node) -> float | None:
    """eps, if ``factor`` is the ``root`` of ``mean(value^2) + eps``."""
    found = op(factor)
    inside = found.node("input") if found is not None and found.name == root else None
    shifted = op(inside) if inside is not None else None
    if shifted is None or shifted.name != "add" or shifted.args.get("alpha", 1) != 1:
        return None
    pair = shifted.args.get("input"), shifted.args.get("other")
    for mean, eps in (pair, pair[::-1]):
        if isinstance(mean, fx.Node) and isinstance(eps, int | float) and _is_mean_square(mean, value):
            return float(eps)
    return None


def _is_mean_square(node: fx.Node, value: fx.Node) -> bool:
    found = op(node)
    squares = found.node("input") if found is not None and found.name == "mean" else None
    if found is None or squares is None or found.args.get("keepdim") is not True:
        return False
    dim = found.args.get("dim")
    dims = dim if isinstance(dim, list | tuple) else (dim,)
    squared = op(squares)
    base = _squared(squared) if squared is not None else None
    return len(dims) == 1 and is_last(dims[0], squares) and base is not None and (
        peel(base, Change.WIDEN) is peel(value, Change.WIDEN)
    )  # fmt: skip


def _squared(found: Op) -> fx.Node | None:
    """What the op is the square of."""
    source = found.node("input")
    if found.name == "square" or (found.name == "pow" and found.args.get("exponent") in (2, 2.0)):
        return source
    return source if found.name == "mul" and source is found.node("other") else None
