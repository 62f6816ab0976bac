"""Linear maps of a few tokens as loops: what decoding on a CPU consists of.

A product of one row and a matrix reads each weight once and does next to nothing with it. The GEMM libraries that
PyTorch calls on CPUs reach a third of the memory's bandwidth in float32 (benchmarks/decode.py); the loop that inductor
writes for ``sum(weight * row)`` comes close to all of it, and takes norm, activation and residual add along.
Lower dtypes have a kernel of their own in PyTorch, which is as good, and are left alone.

Exact: a sum of the same products, in another order.
"""

from __future__ import annotations

from torch import fx, ops

from fxfuse.cpu.products import products

MAX_ROWS = 4
"""Above, products with several rows at a time win: measured for float32 from 576 x 1536 to 11264 x 2048."""


def few_rows_as_loops(graph: fx.Graph) -> int:
    """Rewrite each float32 product of at most `MAX_ROWS` rows with a weight ``[out, in]`` on a CPU; returns how many.

    Args:
        graph: aten ops with fake tensors in ``node.meta["val"]``, as inductor has it after autograd.
    """
    few = [product for product in products(graph) if isinstance(product.count, int) and product.count <= MAX_ROWS]
    for product in few:
        with graph.inserting_before(product.node):
            made = _loops(graph, product.rows, product.weight(), int(product.count))
            if product.bias is not None:
                made = graph.call_function(ops.aten.add.Tensor, (made, product.bias))
        product.replace(made)
    return len(few)


def _loops(graph: fx.Graph, rows: fx.Node, weight: fx.Node, count: int) -> fx.Node:
    """``rows @ weight.T`` as a sum for each row: inductor computes the sums of all rows in one loop over the weight."""
    parts = []
    for index in range(count):
        row = graph.call_function(ops.aten.select.int, (rows, 0, index))
        product = graph.call_function(ops.aten.mul.Tensor, (weight, row))
        total = graph.call_function(ops.aten.sum.dim_IntList, (product, [1]))
        parts.append(graph.call_function(ops.aten.unsqueeze.default, (total, 0)))
    return parts[0] if len(parts) == 1 else graph.call_function(ops.aten.cat.default, (parts,))
