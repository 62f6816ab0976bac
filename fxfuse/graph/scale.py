"""Numbers that multiply values: literal ones, and those that the graph computes (a symbolic float of dynamic=True)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxfuse.graph.ops import Op


@dataclass(frozen=True)
class Scale:
    """``number`` times the numbers that ``nodes`` stand for."""

    number: float = 1.0
    nodes: tuple[fx.Node, ...] = ()

    def __mul__(self, other: Scale) -> Scale:
        nodes = sorted((*self.nodes, *other.nodes), key=lambda node: node.name)
        return Scale(self.number * other.number, tuple(nodes))

    @property
    def is_one(self) -> bool:
        return self.number == 1.0 and not self.nodes

    def __neg__(self) -> Scale:
        return Scale(-self.number, self.nodes)


ONE = Scale()


def is_number(node: fx.Node) -> bool:
    """Whether ``node`` is a number, not a tensor: Dynamo's symbolic floats and integers."""
    return isinstance(node.meta.get("example_value", node.meta.get("val")), torch.SymFloat | torch.SymInt | float | int)


def as_scale(argument: object) -> Scale | None:
    """The argument of a product or an ``alpha`` as a scale, if it is a number."""
    if isinstance(argument, int | float):
        return Scale(float(argument))
    return Scale(1.0, (argument,)) if isinstance(argument, fx.Node) and is_number(argument) else None


def scaling(found: Op) -> tuple[fx.Node, Scale] | None:
    """``(x, c)`` if the op is ``x * c``, ``c * x``, ``x / c`` (c a literal) or ``-x``: a tensor x, a number c."""
    one, other = found.args.get("input"), found.args.get("other")
    if found.name == "neg" and isinstance(one, fx.Node):
        return one, Scale(-1.0)
    if found.name == "div" and isinstance(one, fx.Node) and isinstance(other, int | float):
        return (one, Scale(1.0 / other)) if "rounding_mode" not in found.args and other else None
    if found.name == "mul":
        for value, by in ((one, other), (other, one)):
            scale = as_scale(by)
            if scale is not None and isinstance(value, fx.Node) and not is_number(value):
                return value, scale
    return None
