"""Writes as values: whoever reads memory that was written before depends on the write.

A traced model edits values beside its dataflow: ``a[..., :4] = 0``, ``y.chunk(2)[1].zero_()``, an op with an output
argument. No edge of the graph tells the later readers of ``a`` of that, and a recogniser that follows edges would take
``a`` for what it was before. Here each later reader reads ``as_written(a, write)`` instead: the same memory, and a
value that no recogniser knows, so that nothing looks through it and nothing moves past it. Exact.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TypeVar

from torch import fx

from fxfuse.graph.ops import mutated_arguments
from fxfuse.graph.order import rewrites, written_memory

T = TypeVar("T")


def as_written(value: T, write: object) -> T:
    """``value``, as ``write`` left its memory."""
    return value


def written_by(node: fx.Node) -> fx.Node | None:
    """The write that ``node``, an :func:`as_written`, comes after; None for any other node."""
    write = node.args[1] if node.target is as_written else None
    return write if isinstance(write, fx.Node) else None


def tie_writes(graph: fx.Graph) -> None:
    """Let who reads memory after it was written depend on the write, whatever alias of it they read.

    Where the write returns the very value that it overwrote (``h.add_(f)``) that is what they read. Elsewhere they read
    an :func:`as_written`. A graph that is tied stays as it is.
    """
    memory = written_memory(graph)
    if not memory:
        return
    position: dict[fx.Node, float] = {node: index for index, node in enumerate(graph.nodes)}
    aliases: dict[fx.Node, list[fx.Node]] = defaultdict(list)  # those that may still be read, by region
    for node in list(graph.nodes):
        targets = mutated_arguments(node)
        overwrites = rewrites(node) if targets else None
        for region in dict.fromkeys(memory[target] for target in targets):
            earlier, aliases[region] = aliases[region], []
            for alias in earlier:
                later = [user for user in alias.users if position[user] > position[node] and written_by(user) is None]
                if not later:
                    continue
                read = node if alias is overwrites else _reread(graph, alias, node)
                if read is not node:
                    position[read], memory[read] = position[node] + 0.5, region
                    aliases[region].append(read)
                for user in later:
                    user.replace_input_with(alias, read)
        if node in memory:
            aliases[memory[node]].append(node)


def _reread(graph: fx.Graph, alias: fx.Node, write: fx.Node) -> fx.Node:
    with graph.inserting_after(write):
        read = graph.call_function(as_written, (alias, write))
    read.meta = {key: alias.meta[key] for key in ("example_value", "val", "tensor_meta") if key in alias.meta}
    return read


def untie_writes(graph: fx.Graph) -> None:
    """Take every :func:`as_written` out again: the order of the nodes says what it said."""
    for node in graph.find_nodes(op="call_function", target=as_written):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
