"""What every pass shares: the report it returns, and the few moves of graph surgery."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import fx
from torch.fx.node import Argument

from fxfuse.errors import PlanError
from fxfuse.graph.branch import STAMP, Term
from fxfuse.graph.ops import is_barrier, is_impure, mutated_arguments
from fxfuse.graph.order import writes_in_vain
from fxfuse.graph.sums import Sum
from fxfuse.graph.values import dtype, same_shape, shape, value
from fxfuse.graph.written import untie_writes


@dataclass(frozen=True)
class Edit:
    """One thing that a pass did, or refused to do: to which branches, what, and why or what came of it."""

    branches: tuple[str, ...]
    action: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.action} {' + '.join(self.branches)}" + (f": {self.detail}" if self.detail else "")


@dataclass
class PassReport:
    """What one pass did to one graph and what it left alone, with reasons; ``explain``, logs and tests print it."""

    name: str
    done: list[Edit] = field(default_factory=list)
    refused: list[Edit] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.done)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.done)} done, {len(self.refused)} refused"]
        lines += [f"  {edit}" for edit in self.done]
        lines += [f"  refused: {edit}" for edit in self.refused]
        return "\n".join(lines)


_SAVED = "fxfuse_transaction"


@contextmanager
def transaction(gm: fx.GraphModule, restore: bool = True, tied: bool = False) -> Iterator[None]:
    """All or nothing: the graph is linted and recompiled on success, and put back as it was if anything raises.

    Inside another transaction of the same graph this one does nothing of its own. ``restore=False`` saves the copy
    where nobody will use the graph of a failure. ``tied=True`` leaves writes tied to their readers
    (:mod:`fxfuse.graph.written`), for who goes on to ask what depends on what.
    """
    if gm.meta.get(_SAVED):
        yield
        return
    saved = copy_graph(gm.graph) if restore else gm.graph
    gm.meta[_SAVED] = True
    try:
        yield
        if not tied:
            untie_writes(gm.graph)
        gm.graph.lint()
        gm.recompile()
    except BaseException:
        gm.graph = saved
        raise
    finally:
        del gm.meta[_SAVED]


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy that keeps what Dynamo writes on placeholders beside ``meta``: their sources."""
    made = copy.deepcopy(graph)
    for old, new in zip(graph.find_nodes(op="placeholder"), made.find_nodes(op="placeholder"), strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return made


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
    each: Sum,
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
    if (write := each.write) is not None:
        names = ", ".join(repr(branch.name) for branch in each.branches)
        raise PlanError(f"{names}: added to the stream in place ({write.name}), in memory that others read; "
                        "write h = h + f instead of h += f there")  # fmt: skip
    taken = replaced.get(each.stream.node, each.stream.node)
    with graph.inserting_before(each.out):
        number = each.stream.scale.number
        start = _times(graph, taken, [*each.stream.scale.nodes, *([] if number == 1.0 else [number])])
        made = add_up(graph, start, [Term(replaced.get(t.node, t.node), t.scale) for t in terms], each.out)
        if made is start and (each.stream.node in overwritten or each.out in overwritten):
            made = graph.call_method("clone", (start,))
            made.meta = _meta_of(each.out)
    each.out.replace_all_uses_with(made)
    replaced[each.out] = made
    erase_dead(graph, [each.out], keep={taken, start, *(term.node for term in each.terms)})


def _meta_of(node: fx.Node) -> dict[str, object]:
    return {key: value for key, value in node.meta.items() if key != STAMP}


def erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node], keep: Container[fx.Node] = ()) -> list[fx.Node]:
    """Erase those of ``nodes`` that nobody uses, and what only they used; not ``keep``, nor writes that others see."""
    erased: dict[fx.Node, None] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in erased or node in keep or node.users or (is_impure(node) and not _is_own_write(node)):
            continue
        sources = node.all_input_nodes
        graph.erase_node(node)
        erased[node] = None
        stack.extend(sources)
    return list(erased)


_EMPTY = {("_vmap_increment_nesting", "_vmap_decrement_nesting"), ("_enter_autocast", "_exit_autocast")}


def erase_empty_regions(graph: fx.Graph) -> None:
    """Erase regions that hold nothing any more: their borders would keep others from moving."""
    opened: list[fx.Node] = []
    for node in list(graph.nodes):
        if not is_barrier(node):
            opened.clear()
        elif opened and (_name(opened[-1]), _name(node)) in _EMPTY:
            graph.erase_node(node)
            graph.erase_node(opened.pop())
        else:
            opened.append(node)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", ""))


def _is_own_write(node: fx.Node) -> bool:
    return bool(mutated_arguments(node)) and writes_in_vain(node)
