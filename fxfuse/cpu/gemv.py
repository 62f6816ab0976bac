"""Linear maps of a few tokens as loops: what decoding on a CPU consists of.

A product of one row and a matrix reads each weight once and does next to nothing with it. On processors of other makers
than its own, the GEMM library that PyTorch calls reaches a third of the memory's bandwidth in float32; the loop that
inductor writes for ``sum(weight * row)`` comes close to all of it, and takes norm, activation and residual add along.
Elsewhere the library is the faster one, so it is measured, once for each size.

Exact: a sum of the same products, formed in float32, in another order.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx, ops
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse._torch.fake import tracing_nothing
from fxfuse._torch.inductor import compile_graph
from fxfuse.cpu.products import DTYPES, Product, as_dtype, products
from fxfuse.cpu.race import Linear, aten, linear_map, wins
from fxfuse.graph.ops import op
from fxfuse.graph.values import value
from fxfuse.hardware.configs import Gemm

MAX_ROWS = 4
"""Above, products with several rows at a time win: measured for float32 from 576 x 1536 to 11264 x 2048."""

LEAST = 1 << 16
"""Weights of fewer elements are in a cache, and left alone."""


def few_rows_as_loops(graph: fx.Graph) -> int:
    """Rewrite the products on a CPU for which `measure` found loops to be faster; returns how many.

    Args:
        graph: aten ops with fake tensors in ``node.meta["val"]``, as inductor has it after autograd.
    """
    few = [
        (product, product.count)
        for product in products(graph)
        if isinstance(product.count, int) and (size := product.size()) is not None and _FASTER.get(size, False)
    ]
    for product, count in few:
        with graph.inserting_before(product.node):
            made = _loops(graph, product, count)
        product.replace(made)
    return len(few)


_FASTER: dict[Gemm, bool] = {}


def measure(gm: fx.GraphModule) -> None:
    """Find out for the linear maps of ``gm``, a graph of Dynamo, whether loops are faster: it compiles a sample.

    Not left to the pass, because inductor does not compile while it compiles.
    """
    for size in dict.fromkeys(map(_size_of, gm.graph.nodes)):
        if size is not None and size not in _FASTER:
            _FASTER[size] = loops_win(size)


def _size_of(node: fx.Node) -> Gemm | None:
    call = op(node)
    if call is None or call.name != "linear":
        return None
    x, weight = (None if operand is None else value(operand) for operand in (call.node("input"), call.node("weight")))
    if x is None or weight is None or not (_is_looked_at(x) and _is_looked_at(weight)):
        return None
    sizes = (*x.shape, *weight.shape)
    if not all(isinstance(size, int) for size in sizes) or weight.numel() < LEAST or x.dtype != weight.dtype:
        return None
    rows = x.numel() // max(1, x.shape[-1])
    return linear_map(rows, weight.shape[1], weight.shape[0], x.dtype) if 0 < rows <= MAX_ROWS else None


def _is_looked_at(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in DTYPES


@cache
def loops_win(size: Gemm) -> bool:
    """Whether loops are faster than PyTorch."""
    return wins(compiled_loops(size), aten(size), size)


@cache
def compiled_loops(size: Gemm) -> Linear:
    """``x @ weight.T`` as inductor writes it for loops."""
    with tracing_nothing():
        inputs = [torch.empty(count, size.K, dtype=size.dtype) for count in (size.M, size.N)]
        gm = make_fx(lambda x, weight: torch.mm(x, weight.t()), tracing_mode="fake")(*inputs)
        (product,) = products(gm.graph)
        with gm.graph.inserting_before(product.node):
            made = _loops(gm.graph, product, size.M)
        product.replace(made)
        gm.recompile()
        return compile_graph(gm, inputs)


def _loops(graph: fx.Graph, product: Product, count: int) -> fx.Node:
    """``product`` as a sum for each row: inductor computes the sums of all rows in one loop over the weight."""
    rows, weight = product.rows, product.weight()
    if product.dtype != torch.float32:
        rows, weight = (as_dtype(graph, node, torch.float32) for node in (rows, weight))
    parts = []
    for index in range(count):
        row = graph.call_function(ops.aten.select.int, (rows, 0, index))
        terms = graph.call_function(ops.aten.mul.Tensor, (weight, row))
        total = graph.call_function(ops.aten.sum.dim_IntList, (terms, [1]))
        parts.append(graph.call_function(ops.aten.unsqueeze.default, (total, 0)))
    made = parts[0] if len(parts) == 1 else graph.call_function(ops.aten.cat.default, (parts,))
    if product.bias is not None:  # before the sum is rounded to a lower dtype
        made = graph.call_function(ops.aten.add.Tensor, (made, product.bias))
    return made if product.dtype == torch.float32 else as_dtype(graph, made, product.dtype)
