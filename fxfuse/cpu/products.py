"""The products of rows and weights in a graph of aten ops that a CPU computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, ops

from fxfuse.cpu.race import hint, linear_map
from fxfuse.hardware.configs import Gemm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes whose products are looked at."""

_TARGETS = (ops.aten.mm.default, ops.aten.addmm.default)


@dataclass(frozen=True)
class Product:
    """``rows @ turned`` (plus ``bias``) at ``node``, where ``turned`` ``[in, out]`` is the transpose of a weight.

    Attributes:
        count: how many rows; perhaps symbolic.
        width, fan_in: the sizes of the weight.
    """

    node: fx.Node
    rows: fx.Node
    turned: fx.Node
    bias: fx.Node | None
    count: int | torch.SymInt
    width: int
    fan_in: int
    dtype: torch.dtype

    def size(self) -> Gemm | None:
        """Of a symbolic count the one at hand decides: others are computed as exactly, if perhaps not as fast."""
        rows = hint(self.count)
        return linear_map(rows, self.fan_in, self.width, self.dtype) if rows else None

    def weight(self) -> fx.Node:
        """The weight ``[out, in]`` itself, written at the insertion point: a view."""
        return self.node.graph.call_function(ops.aten.permute.default, (self.turned, [1, 0]))

    def replace(self, new: fx.Node) -> None:
        """Let ``new`` take the place of the product."""
        self.node.replace_all_uses_with(new)
        self.node.graph.erase_node(self.node)


def products(graph: fx.Graph) -> Iterator[Product]:
    """All of them whose weight lies in memory row by row; ``graph`` has fake tensors in ``node.meta["val"]``."""
    for node in [node for target in _TARGETS for node in graph.find_nodes(op="call_function", target=target)]:
        *bias, rows, turned = node.args
        if node.kwargs or not isinstance(rows, fx.Node) or not isinstance(turned, fx.Node):
            continue
        left, right = rows.meta.get("val"), turned.meta.get("val")
        if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.device.type != "cpu":
            continue
        sizes = (*right.shape, right.stride(0))
        if not all(isinstance(size, int) for size in sizes) or right.stride(0) != 1:
            continue
        if left.dtype == right.dtype and left.dtype in DTYPES:
            added = bias[0] if bias and isinstance(bias[0], fx.Node) else None
            yield Product(node, rows, turned, added, left.shape[0], right.shape[1], right.shape[0], left.dtype)


def as_dtype(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """``node`` converted, written at the insertion point."""
    return graph.call_function(ops.prims.convert_element_type.default, (node, dtype))
