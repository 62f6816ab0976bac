"""Functional: what the graph does by writing to memory, written as values that flow from node to node.

A traced model reads ``h`` again after ``h.add_(f)``, by its old name. Here whoever reads it later depends on the node
that wrote it (:mod:`fxfuse.graph.written`), so that data dependence says what happens; and pointwise ops in place,
residual adds above all, become plain ones where nobody can tell the difference. Exact.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import fx
from torch.fx.node import Argument, Target

from fxfuse._torch.ops import OpOverload, op_name, overload_name
from fxfuse.graph.ops import POINTWISE, VIEWS, asks_for_inplace, inplace_position, mutated_arguments, op
from fxfuse.graph.order import aliases, memory_shared_with
from fxfuse.graph.values import dtype, same_shape, value
from fxfuse.graph.written import tie_writes


def make_functional(graph: fx.Graph) -> list[str]:
    """Tie writes to their readers and take pointwise ops in place out; the names of the ops that replace them.

    What torch.export asserts of the values that it traced goes too: it reads every value that is cast.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    if not any(mutated_arguments(node) for node in graph.nodes):
        return []
    tie_writes(graph)
    return _out_of_place(graph)


def _out_of_place(graph: fx.Graph) -> list[str]:
    """Turn ``h += f`` into a new value where the memory of ``h`` is the graph's own and no view of it is read later."""
    order = {each: index for index, each in enumerate(graph.nodes)}
    neighbours = aliases(graph)
    changed: list[str] = []
    for node in list(graph.nodes):
        if (source := _copied(node)) is not None and _is_unseen(node, neighbours, order):
            neighbours[source] |= neighbours.pop(node, set()) - set(node.all_input_nodes)
            for others in neighbours.values():
                others.discard(node)
            for alias in neighbours[source]:
                neighbours[alias].add(source)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            changed.append(source.name)
            continue
        found = op(node)
        if found is None or found.name not in POINTWISE or not found.inplace or "out" in node.kwargs:
            continue
        target, plain = found.node("input"), _plain(node)
        if target is None or plain is None or mutated_arguments(node) != (target,):
            continue
        if not same_shape(target, node) or dtype(target) != dtype(node):
            continue
        if not _is_unseen(node, neighbours, order):
            continue
        with graph.inserting_before(node):
            made = graph.create_node(node.op, *plain)
        made.meta = dict(node.meta)
        order[made] = order[node]
        node.replace_all_uses_with(made)
        neighbours[made] = neighbours.pop(node, set()) - {target}
        for others in neighbours.values():
            others.discard(node)
        for alias in neighbours[made]:
            neighbours[alias].add(made)
        graph.erase_node(node)
        changed.append(made.name)
    return changed


def _is_unseen(node: fx.Node, neighbours: Mapping[fx.Node, set[fx.Node]], order: Mapping[fx.Node, int]) -> bool:
    """Whether who reads ``node`` alone can see what it writes: memory of the graph's own, of which no view is read."""
    (target,) = mutated_arguments(node)
    owners = {target, *memory_shared_with(target, neighbours, but=node)}
    if any(owner.op in ("placeholder", "get_attr") for owner in owners):
        return False
    return not any(order[user] > order[node] for owner in owners - {target} for user in owner.users)


def _copied(node: fx.Node) -> fx.Node | None:
    """What ``y.copy_(x)`` makes of ``y``, whole: new memory that nobody else reads, such as an all-reduce of ``y``."""
    if node.target not in ("copy_", torch.ops.aten.copy_.default) or len(node.args) < 2:
        return None
    target, source = node.args[:2]
    if not isinstance(target, fx.Node) or not isinstance(source, fx.Node) or set(source.users) != {node}:
        return None
    call, known, made = op(source), value(source), value(target)
    if call is None or call.name in VIEWS or call.inplace or known is None or made is None:
        return None
    return source if same_shape(source, target) and (known.dtype, known.device) == (made.dtype, made.device) else None


_Call: TypeAlias = tuple[Target, tuple[Argument, ...], dict[str, Argument]]


def _plain(node: fx.Node) -> _Call | None:
    """The call that computes what ``node`` does and writes nothing, if one is known: ``add`` for ``add_``."""
    target, args, kwargs = node.target, list(node.args), dict(node.kwargs)
    if asks_for_inplace(node):
        position = inplace_position(target)
        if position is not None and position < len(args):
            args[position] = False
        kwargs.pop("inplace", None)
        return target, tuple(args), kwargs
    plain: Target | None
    if isinstance(target, OpOverload):
        packet = getattr(torch.ops.aten, op_name(target).removesuffix("_"), None)
        plain = getattr(packet, overload_name(target), None)
    elif isinstance(target, str):
        plain = target.strip("_").removeprefix("i") if target.startswith("__") else target.removesuffix("_")
    elif target.__module__ == operator.iadd.__module__:
        plain = getattr(operator, target.__name__.removeprefix("i"), None)
    else:
        plain = getattr(torch, target.__name__.removesuffix("_"), None)
    return None if plain is None or plain == target else (plain, node.args, kwargs)
