"""Surgery on graphs: copies, rewrites that are all or nothing, and the removal of what nobody uses."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager

from torch import fx

from fxfuse._torch.ops import REGIONS
from fxfuse._torch.sources import copy_names, copy_sources
from fxfuse.graph.ops import is_barrier, is_impure, mutated_arguments
from fxfuse.graph.order import writes_in_vain
from fxfuse.graph.written import untie_writes

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
    copy_sources(graph, made)
    return made


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph with its module: nodes and ``meta`` are its own, the attributes those of ``gm``."""
    made = fx.GraphModule(gm, copy_graph(gm.graph))
    made.meta = dict(gm.meta)
    copy_names(gm, made)
    return made


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


def erase_empty_regions(graph: fx.Graph) -> None:
    """Erase regions that hold nothing any more: their borders would keep others from moving."""
    opened: list[fx.Node] = []
    for node in list(graph.nodes):
        if not is_barrier(node):
            opened.clear()
        elif opened and (_name(opened[-1]), _name(node)) in REGIONS:
            graph.erase_node(node)
            graph.erase_node(opened.pop())
        else:
            opened.append(node)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", ""))


def _is_own_write(node: fx.Node) -> bool:
    return bool(mutated_arguments(node)) and writes_in_vain(node)
