"""What depends on weights alone: it costs nothing per token, and can be computed once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxfuse.graph.ops import is_random, mutated_arguments
from fxfuse.graph.order import written_memory


def weight_only(gm: fx.GraphModule, weights: Mapping[fx.Node, str]) -> set[fx.Node]:
    """Every node whose value depends on weights alone: ``w.t()``, ``1 + w``.

    Not so a weight or a buffer that the graph writes to, by whatever view, nor what an op draws at random.
    """
    written = written_memory(gm.graph)
    found = {node for node in weights if node not in written}
    for node in gm.graph.nodes:
        sources = node.all_input_nodes if node.op in ("call_function", "call_method") else ()
        if not sources or mutated_arguments(node) or is_random(node):
            continue
        if all(source in found for source in sources):
            found.add(node)
    return found
