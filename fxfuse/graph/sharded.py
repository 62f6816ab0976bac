"""Values that several processes share, as nodes of a graph: an all-reduce, and the local part of a sharded weight.

What tracers leave of these is several nodes, and says nothing of which numbers they keep. In canonical form each is one
call of a function of this file (:mod:`fxfuse.passes.normalise.shards`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from fxfuse._torch.collectives import STARTS, WAITS, reduce_in_group, reduce_in_mesh

LINEAR = frozenset({"sum", "avg"})
"""The kinds of all-reduces that are linear: those of a sum are the sum of theirs."""


def all_reduce(value: Tensor, kind: str, group: object) -> Tensor:
    """The ``kind`` ("sum", "avg", ...) of the values that the processes of ``group`` have, in each of them.

    Args:
        value: of one shape and dtype in all processes.
        kind: what graphs of torch call it.
        group: the name of a process group, or a mesh of one dimension.
    """
    if isinstance(group, str):
        return reduce_in_group(value, kind, group)
    return reduce_in_mesh(value, kind, group)


def local_part(weight: Tensor) -> Tensor:
    """What this process holds of a sharded weight, as a plain tensor; such a part itself as it is."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def is_spread(node: fx.Node) -> bool:
    """Whether ``node`` computes with other processes, or a part of a value that is spread over them."""
    known = node.meta.get("example_value", node.meta.get("val"))
    return node.target in {all_reduce, local_part} | STARTS | WAITS or isinstance(known, DTensor)


def groups_of(graph: fx.Graph) -> list[object]:
    """The groups, by name, and the meshes that a graph's values are spread over or reduced in."""
    found: dict[object, None] = {}
    for node in graph.nodes:
        if node.target in {all_reduce} | STARTS and isinstance(node.args[2], str):
            found[node.args[2]] = None
        known = node.meta.get("example_value")
        if isinstance(known, DTensor):
            found[known.device_mesh] = None
    return list(found)


@dataclass(frozen=True)
class Reduction:
    """A linear all-reduce: of which kind, in which group, of numbers of which dtype."""

    kind: str
    group: str | fx.Node
    dtype: torch.dtype | None


def reduction(node: fx.Node) -> tuple[fx.Node, Reduction] | None:
    """What ``node`` all-reduces, and how, if it is a linear all-reduce."""
    if node.target is not all_reduce:
        return None
    value, kind, group = node.args
    if not isinstance(value, fx.Node) or not isinstance(group, str | fx.Node) or kind not in LINEAR:
        return None
    known = node.meta.get("example_value", node.meta.get("val"))
    return value, Reduction(str(kind), group, known.dtype if isinstance(known, torch.Tensor) else None)


def reduced(graph: fx.Graph, node: fx.Node, how: Reduction) -> fx.Node:
    """The all-reduce of ``node``, written at the insertion point."""
    made = graph.call_function(all_reduce, (node, how.kind, how.group))
    made.meta = {key: node.meta[key] for key in ("example_value", "val") if key in node.meta}
    return made
