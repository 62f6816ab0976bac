"""Linear maps of many tokens on a CPU: by PyTorch's GEMM or by oneDNN's, whichever is faster here.

Which one is depends on the processor and on the sizes, so it is measured, once for each size, when a graph is compiled.
Exact: the same sums of products, in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from fxfuse.cpu.products import Product, products
from fxfuse.kernels import onednn

MARGIN = 0.95
"""oneDNN must take less than this share of the time: a call of it is an opaque op, which costs a few microseconds."""

_BYTES = 1 << 26
"""Weights to go through in a sample: more than a cache holds, because in a model each weight comes from memory."""

_SAMPLES = 5


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
    with torch.no_grad(), _disable_current_modes():
        x = torch.randn(rows, fan_in)
        weights = [torch.randn(fan_out, fan_in) for _ in range(max(1, min(64, _BYTES // (4 * fan_in * fan_out))))]
        by_torch = _sampler(torch.nn.functional.linear, x, weights)
        by_onednn = _sampler(torch.ops.fxfuse.linear, x, weights)
        by_torch(), by_onednn()
        samples = [(by_torch(), by_onednn()) for _ in range(_SAMPLES)]
    return min(one for _, one in samples) < MARGIN * min(one for one, _ in samples)


def _sampler(linear: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        for weight in weights:
            linear(x, weight)
        return time.perf_counter() - start

    return sample
