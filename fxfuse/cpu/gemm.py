"""Linear maps of many tokens on a CPU: by PyTorch's GEMM or by oneDNN's, whichever is faster here.

Exact: the same sums of products, in float32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import fx

from fxfuse.cpu.products import Product, products
from fxfuse.cpu.race import wins
from fxfuse.kernels import onednn


def many_rows_by_onednn(graph: fx.Graph) -> int:
    """Rewrite the float32 products of ``graph`` that oneDNN computes faster on this machine; returns how many.

    Args:
        graph: aten ops with fake tensors in ``node.meta["val"]``, as inductor has it after autograd.
    """
    if not onednn.available():
        return 0
    found = [product for product in products(graph) if _wins(product)]
    for product in found:
        with graph.inserting_before(product.node):
            operands = (product.rows, product.weight(), product.bias)
            made = graph.call_function(torch.ops.fxfuse.linear.default, operands)
        product.replace(made)
    return len(found)


def _wins(product: Product) -> bool:
    rows = product.count.node.hint if isinstance(product.count, torch.SymInt) else product.count
    # Of a symbolic size the one at hand decides: others are computed as exactly, if perhaps not as fast.
    return isinstance(rows, int) and onednn_wins(rows, product.fan_in, product.width, torch.get_num_threads())


@cache
def onednn_wins(rows: int, fan_in: int, fan_out: int, threads: int) -> bool:
    """Whether oneDNN multiplies float32 ``[rows, fan_in]`` with a weight ``[fan_out, fan_in]`` faster than PyTorch."""
    del threads  # a part of the key only
    return wins(torch.ops.fxfuse.linear, torch.nn.functional.linear, rows, fan_in, fan_out)
