"""Linear maps on a CPU: by PyTorch's GEMM, by oneDNN's over the weight as it lies in memory, or in float32.

A processor without instructions for a lower dtype, or with slow ones, computes more products a second in float32, which
is worth converting the weight at each call if there are many rows.

Exact: the same sums of products, formed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, fx, ops

from fxfuse.cpu import onednn
from fxfuse.cpu.products import Product, as_dtype, products
from fxfuse.cpu.race import Linear, aten, fastest
from fxfuse.hardware.configs import Gemm


def other_gemms(graph: fx.Graph) -> int:
    """Rewrite the products of ``graph`` that PyTorch's GEMM is not the fastest for on this machine; returns how many.

    Args:
        graph: aten ops with fake tensors in ``node.meta["val"]``, as inductor has it after autograd.
    """
    rewrites = [
        (product, _WRITTEN[way])
        for product in products(graph)
        if (size := product.size()) is not None and (way := gemm(size)) is not None
    ]
    for product, write in rewrites:
        with graph.inserting_before(product.node):
            made = write(graph, product)
        product.replace(made)
    return len(rewrites)


@cache
def gemm(size: Gemm) -> Linear | None:
    """The fastest one, ``torch.ops.fxfuse.linear`` or `in_float32`; None if that is PyTorch's own."""
    challengers: list[Linear] = []
    if onednn.computes(size.dtype):
        challengers.append(torch.ops.fxfuse.linear)
    if size.dtype != torch.float32:
        challengers.append(in_float32)
    own = aten(size)
    best = fastest(own, challengers, size)
    return None if best is own else best


def in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``, computed in float32 and rounded once."""
    return torch.nn.functional.linear(x.float(), weight.float()).to(x.dtype)


def _by_onednn(graph: fx.Graph, product: Product) -> fx.Node:
    return graph.call_function(ops.fxfuse.linear.default, (product.rows, product.weight(), product.bias))


def _in_float32(graph: fx.Graph, product: Product) -> fx.Node:
    operands = (product.rows, product.turned, *((product.bias,) if product.bias is not None else ()))
    rows, turned, *bias = (as_dtype(graph, operand, torch.float32) for operand in operands)
    target = ops.aten.addmm.default if bias else ops.aten.mm.default
    return as_dtype(graph, graph.call_function(target, (*bias, rows, turned)), product.dtype)


_WRITTEN: dict[Linear, Callable[[fx.Graph, Product], fx.Node]] = {
    torch.ops.fxfuse.linear: _by_onednn,
    in_float32: _in_float32,
}
