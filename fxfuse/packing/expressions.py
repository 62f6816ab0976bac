"""Packed weights as graph expressions: what a rewrite writes down, and a backend computes once instead of per call.

A rewrite that needs the rows of several weights in one tensor says so in the graph, as ``cat`` of expressions of
weights, and marks that node. As it stands the graph is complete: it runs, differentiates and exports, and concatenates
at each call. :mod:`fxfuse.packing.calls` takes the marked nodes out and keeps their values, true to the weights, beside
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import getitem

import torch
from torch import Tensor, fx

from fxfuse._common.units import Units, from_text, to_text
from fxfuse.ffn.affine import Factor, Shift
from fxfuse.ffn.anatomy import Projection
from fxfuse.graph.blocks import blocks_at, join
from fxfuse.graph.values import Dim, dtype, shape, sized, value

PACK = "fxfuse_pack"
"""Key of ``node.meta`` that marks the root of a packed weight; its value says what it is."""

ONE = Factor()


def weight_of(graph: fx.Graph, projection: Projection, factor: Factor = ONE) -> fx.Node:
    """The projection's own rows as ``[width, in]``, each input scaled by ``factor``, in the weight's dtype.

    ``W diag(gain)`` keeps a norm's gain exactly: the product is formed in the wider of the two dtypes, rounded once.
    """
    node = projection.weight
    if projection.transposed:
        node = graph.call_method("t", (node,))
    if projection.rows is not None:
        node = graph.call_function(getitem, (node, projection.rows.cut))
    for function, by in ((torch.mul, factor.gains), (torch.div, factor.divisors)):
        for each in by:
            node = graph.call_function(function, (node, vector(graph, each)))
    node = scaled(graph, node, factor.number)
    wanted = dtype(projection.weight)
    plain = wanted is None or all(dtype(each) == wanted for each in factor.gains + factor.divisors)
    return node if plain else graph.call_method("to", (node, wanted))


def bias_of(graph: fx.Graph, projection: Projection, shifts: Sequence[Shift] = ()) -> fx.Node | None:
    """The projection's bias ``[width]``, with what a norm's ``shifts`` add through the weight; or None."""
    node = projection.bias
    if node is not None and projection.rows is not None:
        node = graph.call_function(getitem, (node, projection.rows.cut))
    for shift in shifts:
        added = spread(graph, _as(graph, shift.node, projection.weight), projection.fan_in, shape(shift.node))
        through = graph.call_function(torch.mv, (weight_of(graph, projection, shift.factor), added))
        node = through if node is None else graph.call_function(torch.add, (through, node))
    return node


def zeros_for(graph: fx.Graph, projection: Projection) -> fx.Node:
    """A bias of zeros ``[width]``, for a member that has none in a pack of those that have."""
    return graph.call_function(torch.zeros_like, (column_of(graph, projection),))


def zeros(graph: fx.Graph, like: fx.Node, dim: int, count: int) -> list[fx.Node]:
    """So many rows (columns, if ``dim`` is 1) of zeros for a pack that ``like`` is a part of; none for a count of 0."""
    if not count:
        return []
    one = graph.call_function(torch.zeros_like, (graph.call_function(torch.narrow, (like, dim, 0, 1)),))
    return [graph.call_function(torch.repeat_interleave, (one, count, dim))]


def column_of(graph: fx.Graph, projection: Projection) -> fx.Node:
    """The first column of the projection's own rows, ``[width]``: something of a bias' size, dtype and device."""
    return graph.call_function(getitem, (weight_of(graph, projection), (slice(None), 0)))


def cat(graph: fx.Graph, parts: Sequence[fx.Node], dim: int, what: str) -> fx.Node:
    """The parts in one tensor along ``dim``, marked as a packed weight; a single weight that lies right as it is."""
    if len(parts) == 1 and parts[0].op not in ("call_function", "call_method"):
        found = value(parts[0])
        if found is not None and found.is_contiguous():
            return parts[0]
    node = graph.call_function(join if blocks_at(parts[0]) else torch.cat, (list(parts), dim))
    node.meta[PACK] = what
    return node


def total(graph: fx.Graph, parts: Sequence[fx.Node], what: str) -> fx.Node:
    """The sum of the parts, marked as a packed weight."""
    node = parts[0]
    for part in parts[1:]:
        node = graph.call_function(torch.add, (node, part))
    if len(parts) > 1 or node.op in ("call_function", "call_method"):
        node.meta[PACK] = what
    return node


def keep(weight: Tensor, dim: int, units: str) -> Tensor:
    """Of a weight the rows (``dim`` 0) or columns of those hidden units that an FFN keeps; what a graph calls.

    The units are text, because an argument of a graph's node is part of its code, and of what recipes compare.
    """
    return weight.index_select(dim, torch.tensor(_units(units), device=weight.device))


_units = lru_cache(maxsize=1024)(from_text)


def kept(graph: fx.Graph, node: fx.Node, dim: int, units: Units, like: fx.Node, *sizes: int) -> fx.Node:
    """A call of :func:`keep`, marked as a packed weight; it has ``sizes``, and dtype and device of ``like``."""
    made = graph.call_function(keep, (node, dim, to_text(units)))
    made.meta[PACK] = f"{len(units)} units"
    made.meta["example_value"] = sized(like, *sizes)
    return made


def kept_of(node: fx.Node) -> tuple[fx.Node, Units] | None:
    """What :func:`kept` was given, if it wrote the node: the expression, and the units."""
    if node.target is not keep:
        return None
    source, _, units = node.args
    assert isinstance(source, fx.Node) and isinstance(units, str)
    return source, _units(units)


def scaled(graph: fx.Graph, node: fx.Node, factor: float) -> fx.Node:
    return node if factor == 1.0 else graph.call_function(torch.mul, (node, factor))


def gained(graph: fx.Graph, node: fx.Node, gains: Sequence[fx.Node], like: fx.Node, column: bool) -> fx.Node:
    """``diag(gains) W`` for a weight ``[out, in]`` (``column``) or a bias ``[out]``, in the dtype of ``like``."""
    for gain in gains:
        by = vector(graph, gain)
        by = graph.call_method("unsqueeze", (by, -1)) if column else by
        node = graph.call_function(torch.mul, (node, by))
    return node if all(dtype(gain) == dtype(like) for gain in gains) else graph.call_method("to", (node, dtype(like)))


def spread(graph: fx.Graph, node: fx.Node, width: int, sizes: tuple[Dim, ...] | None = None) -> fx.Node:
    """A weight of ``sizes``, or its own: one number, or one for each of ``width`` units, as ``[width]``."""
    sizes = shape(node) if sizes is None else sizes
    made = graph.call_method("flatten", (node,)) if len(sizes or ()) != 1 else node
    return made if sizes == (width,) else graph.call_method("expand", (made, width))


def vector(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A gain as ``[in]`` or ``[1]``; some models keep it as ``[1, 1, in]``."""
    sizes = shape(node)
    return node if sizes is None or len(sizes) == 1 else graph.call_method("flatten", (node,))


def _as(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    wanted = dtype(like)
    return node if wanted is None or wanted == dtype(node) else graph.call_method("to", (node, wanted))
