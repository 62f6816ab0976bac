"""Weights of an exported model as expressions of the original's: computed when they are written, and not before.

What a rewrite of the graph would pack (:mod:`fxfuse.packing.expressions`) is written to a scratch graph, and evaluated
on the model's own tensors. So folding a norm's gain means the same in a checkpoint as in a compiled model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse._common.units import Units
from fxfuse.ffn.affine import Factor, Shift
from fxfuse.ffn.projection import Projection
from fxfuse.packing import expressions as pack


@dataclass(frozen=True)
class Weight:
    """A tensor of the exported model.

    Attributes:
        shape: its sizes.
        dtype: its dtype.
        compute: makes it; a tensor of the model itself where the expression is nothing but that.
        sources: the names of the original's parameters that it is made of, in order of use.
        scale: a number that it is multiplied with, so that weights are equal only if their values are.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor] = field(repr=False, compare=False)
    sources: tuple[str, ...] = ()
    scale: float = 1.0

    @classmethod
    def own(cls, tensor: Tensor, name: str) -> Weight:
        """A parameter as it is."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.detach, (name,))

    def __call__(self) -> Tensor:
        """The tensor, contiguous."""
        made = self.compute().detach()
        assert (tuple(made.shape), made.dtype) == (self.shape, self.dtype), "a weight is not what was announced"
        return made.contiguous()

    def times(self, number: float) -> Weight:
        """The same multiplied with a number, the product formed in float64."""
        if number == 1.0:
            return self

        def compute() -> Tensor:
            return (self.compute().double() * number).to(self.dtype)

        return Weight(self.shape, self.dtype, compute, self.sources, self.scale * number)

    def kept(self, dim: int, units: Units | None) -> Weight:
        """Of rows (columns, if ``dim`` is 1) those of some hidden units; all of them if that is None."""
        if units is None:
            return self
        sizes = (*self.shape[:dim], len(units), *self.shape[dim + 1 :])

        def compute() -> Tensor:
            made = self.compute()
            return made.index_select(dim, torch.tensor(units, device=made.device))

        return Weight(sizes, self.dtype, compute, self.sources, self.scale)

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def filled(value: float, shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
    """A tensor of one value: the gain of a norm whose own gain was folded, or padding."""
    return Weight(shape, dtype, lambda: torch.full(shape, value, dtype=dtype))


def stacked(parts: Sequence[Weight], dim: int = 0, padding: int = 0) -> Weight:
    """The parts end to end along ``dim``, then so many rows or columns of zeros.

    Args:
        parts: weights that agree in their dtype and in all sizes but that of ``dim``; at least one.
        dim: 0 for rows, 1 for columns.
        padding: hidden units that contribute exactly nothing.
    """
    first = parts[0]
    if len(parts) == 1 and not padding:
        return first
    total = sum(part.shape[dim] for part in parts) + padding
    shape = (*first.shape[:dim], total, *first.shape[dim + 1 :])

    def compute() -> Tensor:
        made = torch.zeros(shape, dtype=first.dtype)
        start = 0
        for part in parts:
            made.narrow(dim, start, part.shape[dim]).copy_(part.compute())
            start += part.shape[dim]
        return made

    return Weight(shape, first.dtype, compute, tuple(dict.fromkeys(name for part in parts for name in part.sources)))


def added(parts: Sequence[Weight]) -> Weight:
    """The sum of the parts, formed in float64: the bias of a wide FFN's last projection."""
    first = parts[0]
    if len(parts) == 1:
        return first
    sources = tuple(dict.fromkeys(name for part in parts for name in part.sources))

    def compute() -> Tensor:
        return torch.stack([part.compute().double() for part in parts]).sum(0).to(first.dtype)

    return Weight(first.shape, first.dtype, compute, sources)


class Expressions:
    """Makes weights of what a graph says about them.

    Args:
        gm: a captured graph, whose inputs are weights; it is written to.
        inputs: the values of its placeholders.
        names: the dotted names of its weights, by placeholder.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Tensor], names: Mapping[fx.Node, str]) -> None:
        self._graph, self._names = gm.graph, names
        self._held = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        self._end = next(iter(gm.graph.find_nodes(op="output")))

    def of(self, node: fx.Node) -> Weight:
        """A node that depends on weights alone."""
        found = self._value(node)
        return Weight(tuple(found.shape), found.dtype, lambda: self._value(node), self._sources(node))

    def rows(self, projection: Projection, factor: Factor = pack.ONE, gains: Sequence[fx.Node] = ()) -> Weight:
        """A projection's own rows ``[width, in]``, with the factor of its norm and the gains of its output folded."""
        with self._graph.inserting_before(self._end):
            node = pack.weight_of(self._graph, projection, factor)
            node = pack.gained(self._graph, node, gains, projection.weight, True)
        return self._lazy(node, (projection.width, projection.fan_in), projection)

    def bias(
        self, projection: Projection, shifts: Sequence[Shift] = (), gains: Sequence[fx.Node] = ()
    ) -> Weight | None:
        """A projection's bias ``[width]``, with what a norm's ``shifts`` add through the weight; or None."""
        with self._graph.inserting_before(self._end):
            node = pack.bias_of(self._graph, projection, shifts)
            if node is not None:
                node = pack.gained(self._graph, node, gains, projection.weight, False)
        return None if node is None else self._lazy(node, (projection.width,), projection)

    def gain(self, factor: Factor, width: int, dtype: torch.dtype) -> Weight:
        """What a norm's output is multiplied with, ``[width]``, formed in float64."""
        nodes = factor.gains + factor.divisors

        def compute() -> Tensor:
            made = torch.full((width,), factor.number, dtype=torch.float64)
            for gain in factor.gains:
                made = made * self._value(gain).double().flatten()
            for divisor in factor.divisors:
                made = made / self._value(divisor).double().flatten()
            return made.to(dtype)

        sources = tuple(dict.fromkeys(name for node in nodes for name in self._sources(node)))
        return Weight((width,), dtype, compute, sources)

    def _lazy(self, node: fx.Node, shape: tuple[int, ...], projection: Projection) -> Weight:
        dtype = self._value(projection.weight).dtype
        return Weight(shape, dtype, lambda: self._value(node).to(dtype), self._sources(node))

    def _value(self, root: fx.Node) -> Tensor:
        """Evaluate an expression of weights; what it needs on the way is freed with it."""
        known: dict[fx.Node, Tensor] = {}

        def value(node: fx.Node) -> Any:
            if node in self._held:
                return self._held[node].detach().cpu()
            if node not in known:
                args: Any = fx.map_arg(node.args, value)
                kwargs: Any = fx.map_arg(node.kwargs, value)
                function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
                known[node] = function(*args, **kwargs)
            return known[node]

        with torch.no_grad():
            made = value(root)
        assert isinstance(made, Tensor)
        return made

    def _sources(self, node: fx.Node) -> tuple[str, ...]:
        found: dict[str, None] = {}
        seen, stack = set[fx.Node](), [node]
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if current in self._names:
                found[self._names[current]] = None
            stack.extend(reversed(current.all_input_nodes))
        return tuple(found)
