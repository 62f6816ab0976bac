"""Rows: what hands the last dimension of a value on whole, as views of the leading ones do, casts, and idle dropout."""

from __future__ import annotations

import torch
from torch import fx

from fxfuse.graph.ops import Op, drops_randomly, op
from fxfuse.graph.values import dtype, holds, last_dim

_VIEWS = ("view", "flatten", "unflatten", "squeeze", "unsqueeze")


def viewed(node: fx.Node, found: Op) -> fx.Node | None:
    """What ``node`` is a view of that keeps the last dimension, so that rows stay rows; None where sizes don't tell."""
    source = found.node("input") if found.name in _VIEWS else None
    width = last_dim(node)
    return source if source is not None and width is not None and width == last_dim(source) else None


def without_views(node: fx.Node) -> fx.Node:
    """``node`` before the reshapes that keep its last dimension."""
    while (found := op(node)) is not None and (source := viewed(node, found)) is not None:
        node = source
    return node


def passed_on(node: fx.Node, found: Op, read: torch.dtype | None) -> fx.Node | None:
    """The input of a node that passes its value on: a cast, a view of rows, an idle dropout.

    A cast does only where both dtypes are known, since whoever takes it off must be able to put it back, and where it
    rounds no further than ``read``, the dtype that the value is read in at last: to integers or float8 and back is
    another function.
    """
    source = found.node("input")
    if found.name in ("contiguous", "clone") or (found.name == "dropout" and not drops_randomly(found)):
        return source
    if found.name == "cast":
        made = dtype(node)
        if source is None or dtype(source) is None or made is None or read is None:
            return None
        return source if holds(made, read) else None
    return viewed(node, found)


def hides_its_sizes(node: fx.Node, found: Op) -> bool:
    """Whether ``node`` may be a view of rows for all that the graph tells: its sizes were not recorded."""
    return found.name in _VIEWS and last_dim(node) is None
