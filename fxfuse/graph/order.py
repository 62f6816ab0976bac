"""The order of a graph: a stable topological sort that keeps writes, reads and autocast borders where they were.

Dynamo's graphs are not functional (a static cache is written in place), so data dependence alone does not say what may
move. Two nodes that touch memory which the graph writes keep their order, unless both only read it.
"""

from __future__ import annotations

import heapq
import operator
from collections import defaultdict
from collections.abc import Mapping

from torch import fx

from fxfuse._torch.ops import OpOverload, OpOverloadPacket, schema
from fxfuse.graph.ops import VIEWS, is_barrier, mutated_arguments, op
from fxfuse.graph.values import dtype, value


class Stuck(Exception):  # noqa: N818 - a state of the search, not a fault
    """No order of the graph satisfies its dependences: ``nodes`` wait for each other, ``first`` is the earliest."""

    def __init__(self, first: fx.Node, nodes: set[fx.Node], why: str) -> None:
        super().__init__(f"{first.name}: {why}")
        self.first, self.nodes, self.why = first, nodes, why


def written_memory(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node that may share memory with something the graph writes in place, one node that stands for it."""
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent.setdefault(node, node) is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    written = [target for node in graph.nodes for target in mutated_arguments(node)]
    if not written:
        return {}
    for node in graph.nodes:
        for source in _may_alias(node):
            parent[root(node)] = root(source)
    roots = {root(node) for node in written}
    return {node: root(node) for node in list(parent) if root(node) in roots}


def hazards(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """For each node, those that must stay before it because of memory that the graph writes."""
    memory = written_memory(graph)
    before: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    if not memory:
        return before
    last_write: dict[fx.Node, fx.Node] = {}
    reads: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        writes = {memory[target] for target in mutated_arguments(node)}
        touched = {memory[source] for source in node.all_input_nodes if source in memory} | writes
        for region in touched:
            if region in last_write:
                before[node].add(last_write[region])
            if region in writes:
                before[node].update(reads.pop(region, ()))
                last_write[region] = node
            else:
                reads[region].append(node)
    return before


def regions(graph: fx.Graph) -> dict[fx.Node, int]:
    """The number of borders (of autocast, grad mode, vmap) before each node."""
    found: dict[fx.Node, int] = {}
    count = 0
    for node in graph.nodes:
        count += is_barrier(node)
        found[node] = count
    return found


def sort(graph: fx.Graph, hazard: Mapping[fx.Node, set[fx.Node]], region: Mapping[fx.Node, int]) -> None:
    """Reorder ``graph`` so that every node follows its inputs, moving nothing that need not move.

    ``hazard`` and ``region`` are those of the graph before it was edited.

    Raises:
        Stuck: no such order exists.
    """
    nodes = list(graph.nodes)
    rank = {node: index for index, node in enumerate(nodes)}
    seen = 0
    level: dict[fx.Node, int] = {}
    for node in nodes:
        seen = max(seen, region.get(node, seen))
        level[node] = region.get(node, seen)
    waiting: dict[fx.Node, int] = {}
    after: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        sources = {*node.all_input_nodes, *(h for h in hazard.get(node, ()) if h in rank)}
        waiting[node] = len(sources)
        for source in sources:
            after[source].append(node)
    # Placeholders come first and in their order; a barrier opens its region; the output ends the last one.
    ready = [(_key(node, level, rank), node) for node in nodes if not waiting[node]]
    heapq.heapify(ready)
    done: list[fx.Node] = []
    while ready:
        _, node = heapq.heappop(ready)
        if done and level[node] < level[done[-1]]:
            raise Stuck(node, {node}, "it would have to cross the border of an autocast, no_grad or vmap region")
        done.append(node)
        for user in after[node]:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (_key(user, level, rank), user))
    if len(done) != len(nodes):
        stuck = min((node for node in nodes if waiting[node] > 0), key=rank.__getitem__)
        waits = {node for node in nodes if waiting[node] > 0}
        raise Stuck(stuck, waits, "it needs a value that is made only after the place where its group stands")
    if done == nodes:
        return
    output = graph.output_node()
    for node in done:
        if node is not output:
            output.prepend(node)


def _key(node: fx.Node, level: Mapping[fx.Node, int], rank: Mapping[fx.Node, int]) -> tuple[int, int, int]:
    last = node.op == "output"
    return (1 if last else 0, level[node], rank[node])


def aliases(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """For each node, those that it may share memory with directly: its views, what it is a view of, what it writes."""
    neighbours: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    for node in graph.nodes:
        for source in _may_alias(node):
            neighbours[node].add(source)
            neighbours[source].add(node)
    return neighbours


def memory_shared_with(node: fx.Node, neighbours: Mapping[fx.Node, set[fx.Node]], but: fx.Node) -> set[fx.Node]:
    """What may share memory with ``node`` by some path of :func:`aliases` that does not pass ``but``."""
    found = {node, but}
    stack = [node]
    while stack:
        for near in neighbours.get(stack.pop(), set()) - found:
            found.add(near)
            stack.append(near)
    return found - {node, but}


def _may_alias(node: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs whose memory the output of ``node`` may be; of an op that the vocabulary does not know, all."""
    if node.op == "call_module":
        return tuple(node.all_input_nodes)
    if node.op not in ("call_function", "call_method"):
        return ()
    found, written = op(node), mutated_arguments(node)
    if found is not None:
        source = found.node("input")
        if found.name not in VIEWS or source is None:
            return written
        copies = found.name == "cast" and dtype(source) is not None and dtype(source) != dtype(node)
        return written if copies else (*written, source)
    if written:
        return written
    if isinstance(node.target, OpOverload) and all(r.alias_info is None for r in schema(node.target).returns):
        return ()
    return tuple(node.all_input_nodes)


def overwritten(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory the graph writes after it has made them: they cannot be read at a later place."""
    memory = written_memory(graph)
    found: set[fx.Node] = set()
    written: set[fx.Node] = set()
    for node in reversed(graph.nodes) if memory else ():
        if memory.get(node) in written:
            found.add(node)
        written.update(memory[target] for target in mutated_arguments(node))
    return found


def rewrites(node: fx.Node) -> fx.Node | None:
    """The value that ``node`` overwrites and then is: ``h`` for ``h.add_(f)``; None for what returns something else."""
    written = mutated_arguments(node)
    if len(written) != 1 or node.target in (operator.setitem, "__setitem__"):
        return None
    if isinstance(node.target, OpOverload | OpOverloadPacket):
        # By its schema, which a packet does not have: the first value returned is the one argument written.
        returns = schema(node.target).returns if isinstance(node.target, OpOverload) else ()
        info = returns[0].alias_info if len(returns) == 1 else None
        return written[0] if info is not None and info.is_write else None
    made, known = value(node), value(written[0])
    return written[0] if made is not None and known is not None and made.shape == known.shape else None


def writes_in_vain(node: fx.Node) -> bool:
    """Whether nobody reads what ``node`` writes: memory that was made in the graph, of which nothing after it reads."""
    seen: set[fx.Node] = {node}
    stack = list(mutated_arguments(node))
    while stack:
        alias = stack.pop()
        if alias in seen:
            continue
        seen.add(alias)
        if alias.op not in ("call_function", "call_method") or any(user > node for user in alias.users):
            return False
        stack += _may_alias(alias)
        stack += [user for user in alias.users if alias in _may_alias(user)]
    return True
