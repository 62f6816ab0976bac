"""Shards: what a graph computes with DTensors, written as this process computes it, on plain tensors. Exact.

Under ``parallelize_module`` Dynamo's graphs say ``x.from_local(R) -> linear -> redistribute -> to_local``: the linear
maps are those of sharded weights, and between them the model works on plain tensors. Which numbers of a matrix a
process has, a placement says; from it follows what each step is to this process alone:

| step | on plain tensors |
|---|---|
| ``from_local``, ``to_local``, ``redistribute`` to the placement at hand | nothing |
| ``linear`` of a replicated value and of rows | the linear map of those rows: a part of the features |
| ``linear`` of a part of the features and of the columns for it | that linear map: a part of each sum |
| ``redistribute`` of parts of sums to whole ones | an all-reduce |
| an op on each number alone | that op |

The bias of a linear map whose sums are in parts is added in each process, divided by their number: so DTensor does it.
What is not in the table stays a DTensor's, whole: from where plain tensors become one to where it becomes one of those.
So does what has gradients, because those of a plain tensor in all processes are no longer added up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from fxfuse.graph.ops import Op, drops_randomly, is_pointwise, op
from fxfuse.graph.sharded import all_reduce, local_part
from fxfuse.graph.surgery import erase_dead
from fxfuse.graph.values import value

_REPLICATED = Replicate()


def localise(graph: fx.Graph) -> list[str]:
    """Write what is done with DTensors on plain tensors, where the table of this module says how; what is gone."""
    ends = [node for node in graph.nodes if node.op == "call_method" and node.target == "to_local"]
    if not ends:
        return []
    gone: list[str] = []
    shards = _Shards(graph)
    for node in ends:
        known, source = value(node), node.args[0]
        if known is None or known.requires_grad or not isinstance(source, fx.Node):
            continue
        if (made := shards.local(source)) is not None:
            node.replace_all_uses_with(made)
            gone.append(node.name)
    erase_dead(graph, ends)
    shards.erase_unused()
    return gone


class _Shards:
    """The local values of a graph's DTensors, written as they are asked for."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._local: dict[fx.Node, fx.Node | None] = {}
        self._mesh: dict[fx.Node, fx.Node] = {}  # the node that stands for the mesh of a DTensor, where one is known
        self._made: list[fx.Node] = []

    def local(self, node: fx.Node) -> fx.Node | None:
        """What this process holds of a DTensor, as a node; None if the table does not tell."""
        if node not in self._local:
            self._local[node] = self._written(node) if placement(node) is not None else None
        return self._local[node]

    def erase_unused(self) -> None:
        """Erase what was written for a DTensor of which the rest could not be."""
        erase_dead(self._graph, reversed(self._made))

    def _written(self, node: fx.Node) -> fx.Node | None:
        known, call = value(node), op(node)
        if known is None or (known.requires_grad and node.op not in ("placeholder", "get_attr")):
            return None
        if node.op in ("placeholder", "get_attr"):
            return self._call(node, local_part, (node,))
        if node.target is DTensor.from_local:
            return self._entered(node)
        if len(node.users) > 1:
            return None  # another user of it might go on with the DTensor, and all would be computed twice
        if node.target == "redistribute":
            return self._redistributed(node)
        if call is not None and call.name == "linear":
            return self._linear(node, call)
        return self._pointwise(node, call) if call is not None else None

    def _entered(self, node: fx.Node) -> fx.Node | None:
        """A plain tensor that became a DTensor."""
        source, mesh = node.args[:2] if len(node.args) > 1 else (None, None)
        if not isinstance(source, fx.Node) or not isinstance(mesh, fx.Node):
            return None
        if node.kwargs.get("run_check", False) is not False or node.kwargs.keys() - {"run_check"}:
            return None
        self._mesh[node] = mesh
        return source

    def _redistributed(self, node: fx.Node) -> fx.Node | None:
        source = node.args[0]
        if not isinstance(source, fx.Node) or node.kwargs.keys() - {"placements", "async_op"}:
            return None
        made, before, after = self.local(source), placement(source), placement(node)
        mesh = self._mesh.get(source)
        if made is None or len(node.args) > 1:
            return None
        if mesh is not None:
            self._mesh[node] = mesh
        if before == after:
            return made
        if mesh is None or type(before) is not Partial or after != _REPLICATED:
            return None
        return self._call(node, all_reduce, (made, before.reduce_op, mesh))

    def _linear(self, node: fx.Node, call: Op) -> fx.Node | None:
        x, weight, bias = call.node("input"), call.node("weight"), call.node("bias")
        if x is None or weight is None or (bias is None and call.args.get("bias") is not None):
            return None
        parts = self.local(x), self.local(weight), None if bias is None else self.local(bias)
        whole = value(x)
        if parts[0] is None or parts[1] is None or whole is None or (bias is not None and parts[2] is None):
            return None
        features, made = Shard(whole.dim() - 1), placement(node)
        held = placement(x), placement(weight), None if bias is None else placement(bias)
        columns = [(features, *rest) for rest in _COLUMNS]
        if (held in _ROWS and made == features) or (held in _WHOLE and made == _REPLICATED):
            added = parts[2]
        elif held in columns and made == Partial("sum"):
            added = self._share(node, bias, parts[2])
        else:
            return None
        if x in self._mesh:
            self._mesh[node] = self._mesh[x]
        return self._call(node, F.linear, (parts[0], parts[1], added))

    def _share(self, node: fx.Node, bias: fx.Node | None, part: fx.Node | None) -> fx.Node | None:
        """What each process adds of a bias, so that all together add it once."""
        known = value(bias) if bias is not None else None
        if bias is None or part is None:
            return None
        assert isinstance(known, DTensor)
        return self._call(bias, torch.div, (part, known.device_mesh.size()), before=node)

    def _pointwise(self, node: fx.Node, call: Op) -> fx.Node | None:
        sources = node.all_input_nodes
        held = {placement(source) for source in sources}
        if not is_pointwise(call) or drops_randomly(call) or call.inplace or held != {placement(node)}:
            return None
        if isinstance(placement(node), Partial) or any(value(s).shape != value(node).shape for s in sources):  # type: ignore[union-attr]  # they have placements
            return None
        new = {source: self.local(source) for source in sources}
        if any(part is None for part in new.values()):
            return None
        with self._graph.inserting_before(node):
            made = self._graph.node_copy(node, lambda source: new[source] or source)
        self._mesh.update((node, self._mesh[source]) for source in sources if source in self._mesh)
        return self._noted(node, made)

    def _call(
        self,
        node: fx.Node,
        function: Callable[..., object],
        args: tuple[fx.node.Argument, ...],
        before: fx.Node | None = None,
    ) -> fx.Node:
        """A call that makes what this process holds of ``node``, written ``before`` a node, or at its place."""
        here = before or node
        while here.op in ("placeholder", "get_attr"):
            here = here.next
        with self._graph.inserting_before(here):
            return self._noted(node, self._graph.call_function(function, args))

    def _noted(self, node: fx.Node, made: fx.Node) -> fx.Node:
        known = value(node)
        assert isinstance(known, DTensor)
        with torch.no_grad():
            made.meta = {"example_value": known.to_local()}
        self._made.append(made)
        return made


_ROWS = [(_REPLICATED, Shard(0), None), (_REPLICATED, Shard(0), Shard(0))]
_COLUMNS = [(Shard(1), None), (Shard(1), _REPLICATED)]
_WHOLE = [(_REPLICATED, _REPLICATED, None), (_REPLICATED, _REPLICATED, _REPLICATED)]


def placement(node: fx.Node) -> Placement | None:
    """Which numbers of a DTensor a process holds; None for what is none, or is spread over more than one dimension."""
    known = value(node)
    if not isinstance(known, DTensor) or len(known.placements) != 1:
        return None
    return known.placements[0]
