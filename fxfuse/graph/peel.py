"""Looking through ops: a table of what each op may change, and one way to take off those that change little enough.

Every op here keeps the last dimension of each row whole. The caller says which changes it allows, and :func:`peel`
takes off the ops that make no others. To look through one more op is a row of the table, a rule for its
:class:`Change` if that is a new one, and a test that the op keeps what the change promises.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import TypeAlias

import torch
from torch import fx

from fxfuse.graph.ops import Op, drops_randomly, op
from fxfuse.graph.scale import ONE, Scale, scaling
from fxfuse.graph.sharded import LINEAR
from fxfuse.graph.values import Dim, dtype, holds, last_dim, product, shape

_Nodes: TypeAlias = Container[fx.Node]
_Test: TypeAlias = Callable[[fx.Node], bool]


class Change(Flag):
    """What an op makes of ``x``; ``w`` depends on weights alone."""

    COPY = auto()
    """``x``, perhaps in other memory."""
    REDUCE = auto()
    """The sum, or the mean, of the ``x`` of several processes."""
    ROWS = auto()
    """The same rows in other leading dimensions."""
    WIDEN = auto()
    """The same numbers in another dtype, which loses none."""
    ROUND = auto()
    """The numbers rounded to another dtype, or to one that is not known."""
    NUMBER = auto()
    """``scale * x``."""
    GAIN = auto()
    """``x * w``, w one number or a vector over the last dimension."""
    DIVISOR = auto()
    """``x / w``, such a w."""
    SHIFT = auto()
    """``scale * x + share * w``, such a w."""
    MASK = auto()
    """``x * w`` or ``x / w``, w of any other shape."""
    TABLE = auto()
    """``scale * x + share * w``, w of any other shape."""


PASSED = Change.COPY | Change.ROWS | Change.WIDEN
"""What leaves each number what it is."""

_CAST = Change.WIDEN | Change.ROUND

TABLE: Mapping[str, Change] = {
    "contiguous": Change.COPY,
    "clone": Change.COPY,
    "dropout": Change.COPY,
    "view": Change.ROWS,
    "flatten": Change.ROWS,
    "unflatten": Change.ROWS,
    "squeeze": Change.ROWS,
    "unsqueeze": Change.ROWS,
    "cast": _CAST,
    "all_reduce": Change.REDUCE,
    "neg": Change.NUMBER,
    "mul": Change.NUMBER | Change.GAIN | Change.MASK,
    "div": Change.NUMBER | Change.DIVISOR | Change.MASK,
    "add": Change.SHIFT | Change.TABLE,
    "sub": Change.SHIFT | Change.TABLE,
}
"""The changes that an op may make, by its name in :mod:`fxfuse.graph.ops`; each :class:`Layer` makes one of them."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One op that can be looked through: ``node`` is ``change`` of ``source``.

    Attributes:
        scale: the numbers that ``source`` is multiplied with.
        weight: the node that depends on weights alone, if the change takes one.
        share: the number that a weight is multiplied with before it is added.
    """

    node: fx.Node
    source: fx.Node
    change: Change
    scale: Scale = ONE
    weight: fx.Node | None = None
    share: float = 1.0


def layer(
    node: fx.Node, allow: Change, weights: _Nodes = (), width: Dim | None = None, read: torch.dtype | None = None
) -> Layer | None:
    """The op that ``node`` is, if it makes one of the changes ``allow``.

    Args:
        node: any node.
        allow: the changes that the caller can do without, or make anew.
        weights: the nodes that depend on weights alone; without them no weight is known.
        width: the size of the last dimension, where the graph does not tell.
        read: the dtype that the value is read in at last. A cast that holds all its numbers counts as widening.
    """
    call = op(node)
    possible = TABLE.get(call.name) if call is not None else None
    if call is None or possible is None or not possible & allow:
        return None
    source = call.node("input")
    if possible not in PASSED | _CAST | Change.REDUCE:
        made = _arithmetic(node, call, weights, last_dim(node) or width)
    else:
        change = _change(node, call, source, read) if source is not None else None
        made = Layer(node, source, change) if source is not None and change is not None else None
    return made if made is not None and made.change in allow else None


def layers(
    node: fx.Node,
    allow: Change,
    weights: _Nodes = (),
    width: Dim | None = None,
    read: torch.dtype | None = None,
    within: _Test = lambda _: True,
) -> Iterator[Layer]:
    """The ops around a value, the outermost first, down to one that makes another change or is not ``within``."""
    while within(node) and (taken := layer(node, allow, weights, width, read)) is not None:
        yield taken
        node = taken.source


def peel(node: fx.Node, allow: Change, weights: _Nodes = (), within: _Test = lambda _: True) -> fx.Node:
    """``node`` before the ops that make no other changes than ``allow``: the source of the last of its layers."""
    for taken in layers(node, allow, weights, within=within):
        node = taken.source
    return node


def hides_its_sizes(node: fx.Node) -> bool:
    """Whether ``node`` may be a view of rows for all that the graph tells: its sizes were not recorded."""
    call = op(node)
    return call is not None and TABLE.get(call.name) is Change.ROWS and last_dim(node) is None


def _change(node: fx.Node, call: Op, source: fx.Node, read: torch.dtype | None) -> Change | None:
    """What an op of one value does to it; None if that is nothing of the table, or the graph does not tell."""
    change = TABLE[call.name]
    if change is Change.COPY:
        return None if drops_randomly(call) else change
    if change is Change.REDUCE:
        return change if call.args.get("kind") in LINEAR else None
    if change is Change.ROWS:
        return change if last_dim(node) is not None and last_dim(node) == last_dim(source) else None
    made, given = dtype(node), dtype(source)  # whoever takes a cast off must be able to put it back
    return Change.WIDEN if made is not None and given is not None and holds(made, read or given) else Change.ROUND


def _arithmetic(node: fx.Node, call: Op, weights: _Nodes, width: Dim | None) -> Layer | None:
    """A value and a number, or a value and a weight."""
    if (scaled := scaling(call)) is not None:
        return None if scaled[0] in weights else Layer(node, scaled[0], Change.NUMBER, scaled[1])
    source, weight = call.node("input"), call.node("other")
    if source is None or weight is None or (source in weights) == (weight in weights):
        return None
    first = weight in weights
    source, weight = (source, weight) if first else (weight, source)
    change, scale, share = Change.GAIN, 1.0, 1.0
    if call.name == "div":
        change = Change.DIVISOR
        if not first or "rounding_mode" in call.args:
            return None
    elif call.name in ("add", "sub"):
        change, alpha = Change.SHIFT, call.args.get("alpha", 1)
        if not isinstance(alpha, int | float):
            return None
        added = float(alpha) if call.name == "add" else -float(alpha)
        scale, share = (1.0, added) if first else (added, 1.0)
    if not _over_last(weight, source, width):
        change = Change.TABLE if change is Change.SHIFT else Change.MASK
    return Layer(node, source, change, Scale(scale), weight, share)


def _over_last(weight: fx.Node, source: fx.Node, width: Dim | None) -> bool:
    """Whether a weight is one number, or a vector over the last dimension of ``source``, which is ``width``."""
    sizes, given = shape(weight), shape(source)
    if sizes is None or product(sizes) == 1:
        return sizes is not None
    return product(sizes) == sizes[-1] == width and (given is None or given[-1:] == (width,))
