"""The few moves that change a residual stream: a sum with other terms, in the dtype and shape of what it replaces."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import fx
from torch.fx.node import Argument

from fxfuse.errors import PlanError
from fxfuse.graph.surgery import erase_dead
from fxfuse.graph.values import dtype, same_shape, shape, value
from fxfuse.stream.branch import STAMP, Term
from fxfuse.stream.sums import Sum


def add_up(graph: fx.Graph, start: fx.Node, terms: Sequence[Term], like: fx.Node) -> fx.Node:
    """``start + terms`` from left to right, inserted at the graph's insertion point, of ``like``'s dtype and meta.

    From left to right, so that no low-precision partial sum of branches arises that the model did not have. A term of
    another shape has the same rows: its branch works on a stream that the model has flattened, or has not.
    """
    node = start
    for term in terms:
        added = term.node if same_shape(term.node, start) else _rows_like(graph, term.node, start)
        added = _times(graph, added, term.scale.nodes)
        kwargs: dict[str, Argument] = {} if term.scale.number == 1.0 else {"alpha": term.scale.number}
        node = graph.call_function(torch.add, (node, added), kwargs)
        node.meta = _meta_of(like)
    if node is start and dtype(start) is not None and dtype(start) != dtype(like):
        node = graph.call_method("to", (start, dtype(like)))
        node.meta = _meta_of(like)
    return node


def _times(graph: fx.Graph, node: fx.Node, factors: Sequence[fx.Node | float]) -> fx.Node:
    """``node`` times numbers, inserted at the graph's insertion point."""
    for factor in factors:
        made = graph.call_function(torch.mul, (node, factor))
        made.meta = {key: held for key, held in node.meta.items() if key in ("example_value", "val", STAMP)}
        node = made
    return node


def _rows_like(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    """The rows of ``node``, a branch's term, in the shape of ``like``, inserted at the graph's insertion point."""
    made = graph.call_method("reshape_as", (node, like))
    known, target = value(node), value(like)
    if known is not None and target is not None:
        made.meta["example_value"] = known.new_empty(target.shape)
    if STAMP in node.meta:
        made.meta[STAMP] = node.meta[STAMP]
    return made


def shaped(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    """The rows of ``node`` in the leading dimensions of ``like``, inserted at the graph's insertion point.

    Raises:
        PlanError: those are symbolic.
    """
    sizes = shape(like) or ()
    if all(isinstance(size, int) for size in sizes):
        made = graph.call_method("reshape", (node, tuple(map(int, sizes))))
    elif len(sizes) == 2:
        made = graph.call_method("flatten", (node, 0, -2))
    else:
        raise PlanError(f"a group joins streams of shapes {shape(node)} and {sizes}; compile without dynamic=True")
    known, target = value(node), value(like)
    if known is not None and target is not None:
        made.meta["example_value"] = known.new_empty(target.shape)
    return made


def resum(
    graph: fx.Graph,
    residual: Sum,
    terms: Sequence[Term],
    replaced: dict[fx.Node, fx.Node],
    overwritten: Container[fx.Node] = (),
) -> None:
    """Replace the sum by ``stream + terms``. The terms that it had stay in the graph, used or not.

    So do the factors before and after it: what is added here is scaled by those that come after.

    ``replaced`` maps the points of the stream that were replaced before to what stands there now, and learns this one.
    ``overwritten`` are the nodes whose memory is written later: of those a sum without terms is a copy.

    Raises:
        PlanError: the sum writes in place, to memory that others know.
    """
    if (write := residual.write) is not None:
        names = ", ".join(repr(branch.name) for branch in residual.branches)
        raise PlanError(f"{names}: added to the stream in place ({write.name}), in memory that others read; "
                        "write h = h + f instead of h += f there")  # fmt: skip
    taken = replaced.get(residual.stream.node, residual.stream.node)
    with graph.inserting_before(residual.out):
        number = residual.stream.scale.number
        start = _times(graph, taken, [*residual.stream.scale.nodes, *([] if number == 1.0 else [number])])
        made = add_up(graph, start, [Term(replaced.get(t.node, t.node), t.scale) for t in terms], residual.out)
        if made is start and (residual.stream.node in overwritten or residual.out in overwritten):
            made = graph.call_method("clone", (start,))
            made.meta = _meta_of(residual.out)
    residual.out.replace_all_uses_with(made)
    replaced[residual.out] = made
    erase_dead(graph, [residual.out], keep={taken, start, *(term.node for term in residual.terms)})


def _meta_of(node: fx.Node) -> dict[str, object]:
    return {key: value for key, value in node.meta.items() if key != STAMP}
