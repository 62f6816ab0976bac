"""Linear maps on a CPU: by PyTorch's GEMM or by oneDNN's, over the weight as it lies in memory.

Exact: the same sums of products, formed in float32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import fx

from fxfuse.cpu.products import products
from fxfuse.cpu.race import Size, wins
from fxfuse.kernels import onednn


def by_onednn(graph: fx.Graph) -> int:
    """Rewrite the products of ``graph`` that oneDNN computes faster on this machine; returns how many.

    Args:
        graph: aten ops with fake tensors in ``node.meta["val"]``, as inductor has it after autograd.
    """
    found = [product for product in products(graph) if (size := product.size()) is not None and onednn_wins(size)]
    for product in found:
        with graph.inserting_before(product.node):
            operands = (product.rows, product.weight(), product.bias)
            made = graph.call_function(torch.ops.fxfuse.linear.default, operands)
        product.replace(made)
    return len(found)


@cache
def onednn_wins(size: Size) -> bool:
    """Whether oneDNN is faster than PyTorch."""
    return onednn.computes(size.dtype) and wins(torch.ops.fxfuse.linear, torch.nn.functional.linear, size)
