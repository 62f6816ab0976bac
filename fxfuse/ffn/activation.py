"""What an FFN does between its projections, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from fxfuse.ffn.anatomy import FFN, Projection
from fxfuse.graph.ops import op
from fxfuse.graph.peel import Change, peel


@dataclass(frozen=True)
class Activation:
    """``name(gate) * up``, or ``name(gate)`` where there is no up.

    Attributes:
        name: silu, gelu (exact), gelu_tanh, relu, relu2 (its square) or sigmoid.
    """

    name: str
    gate: Projection
    up: Projection | None


def activation_of(ffn: FFN) -> Activation | None:
    """The activation of ``ffn``; None if it has no name here, or takes weights."""
    leaves = {each.output: each for each in ffn.projections}
    root = _plain(ffn.down.input)
    if ffn.constants or len(leaves) > 2:
        return None
    if len(leaves) == 1:
        found = _named(root, leaves)
        return None if found is None else Activation(*found, None)
    product = op(root)
    pair = (product.node("input"), product.node("other")) if product is not None and product.name == "mul" else ()
    for one, other in (pair, pair[::-1]) if len(pair) == 2 else ():
        if one is None or other is None:
            continue
        found, up = _named(_plain(one), leaves), leaves.get(_plain(other, leaves))
        if found is not None and up is not None and up is not found[1]:
            return Activation(*found, up)
    return None


def _named(node: fx.Node, leaves: Mapping[fx.Node, Projection]) -> tuple[str, Projection] | None:
    """``(name, gate)`` if ``node`` is a named function of a projection."""
    found = op(node)
    source = found.node("input") if found is not None else None
    if found is None or source is None:
        return None
    leaf = leaves.get(_plain(source, leaves))
    match found.name:
        case "silu" | "relu" | "sigmoid" if leaf is not None:
            return found.name, leaf
        case "gelu" if leaf is not None:
            return {"none": "gelu", "tanh": "gelu_tanh"}[str(found.args.get("approximate", "none"))], leaf
        case "square":
            return _product(source, source, leaves)
        case "pow" if found.args.get("exponent") in (2, 2.0):
            return _product(source, source, leaves)
        case "mul" if (other := found.node("other")) is not None:
            return _product(source, other, leaves)
    return None


def _product(one: fx.Node, other: fx.Node, leaves: Mapping[fx.Node, Projection]) -> tuple[str, Projection] | None:
    """The square of a ReLU, or a SiLU written out."""
    first, second = _named(_plain(one), leaves), _named(_plain(other), leaves)
    if first is not None and first[0] == "relu" and first == second:
        return "relu2", first[1]
    return _silu(one, second, leaves) or _silu(other, first, leaves)


def _silu(
    value: fx.Node, factor: tuple[str, Projection] | None, leaves: Mapping[fx.Node, Projection]
) -> tuple[str, Projection] | None:
    """``x * sigmoid(x)``."""
    leaf = leaves.get(_plain(value, leaves))
    return ("silu", leaf) if leaf is not None and factor == ("sigmoid", leaf) else None


def _plain(node: fx.Node, leaves: Mapping[fx.Node, Projection] | None = None) -> fx.Node:
    """``node`` before views, copies and idle dropout, none of which changes a hidden unit; a leaf is not opened."""
    return peel(node, Change.COPY | Change.ROWS, within=lambda inner: inner not in (leaves or ()))
