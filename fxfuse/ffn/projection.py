"""Projections: rows of a linear map, in every spelling: linear, ``x @ w``, addmm, a slice of a packed one."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace

from torch import fx, nn

from fxfuse.graph.ops import MATMUL, Op, op
from fxfuse.graph.peel import Change, layer, peel
from fxfuse.graph.slices import Rows, last_dim_part
from fxfuse.graph.values import called_module, shape, value


@dataclass(frozen=True)
class Projection:
    """Some rows of ``weight @ x + bias``, as they come out at ``output``.

    Attributes:
        output: node with the value of those rows, ``[..., width]``.
        input: node ``x`` as the linear op takes it, views of the leading dimensions taken off.
        weight: weight-only node, ``[out, in]``, or ``[in, out]`` if ``transposed`` (``x @ w``, Conv1D).
        bias: weight-only node ``[out]`` or None.
        rows: which rows of the weight, or None for all of them.
        width: how many rows those are.
        fan_in: the size of ``x``'s last dimension.
    """

    output: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    rows: Rows | None
    width: int
    fan_in: int


def projection(node: fx.Node, weights: Container[fx.Node]) -> Projection | None:
    """``node`` as rows of a linear map of something, if it is that; ``weights`` are the weight-only nodes."""
    part = last_dim_part(node)
    if part is not None:
        whole_node, rows_of = part
        whole = projection(whole_node, weights)
        if whole is None or whole.rows is not None:
            return None
        rows = rows_of(whole.width)
        everything = rows == Rows(0, whole.width)
        return replace(whole, output=node, rows=None if everything else rows, width=rows.count)
    call = op(node)
    if call is None:
        return None
    if (view := layer(node, Change.ROWS)) is not None:
        inner = projection(view.source, weights)
        return None if inner is None or inner.rows is not None else replace(inner, output=node)
    if call.name == "add" and call.args.get("alpha", 1) == 1:
        return _biased(node, call, weights)
    if call.name == "linear":
        return _linear(node, call.node("input"), call.node("weight"), call.node("bias"), False, weights)
    if call.name == "matmul":
        return _linear(node, call.node("input"), call.node("other"), None, True, weights)
    if call.name == "addmm" and not set(node.kwargs) & {"alpha", "beta"}:
        return _linear(node, call.node("input"), call.node("other"), call.node("bias"), True, weights)
    return None


def _linear(
    node: fx.Node,
    source: fx.Node | None,
    weight: fx.Node | None,
    bias: fx.Node | None,
    transposed: bool,
    weights: Container[fx.Node],
) -> Projection | None:
    if source is None or weight is None or weight not in weights or source in weights:
        return None
    if bias is not None and bias not in weights:
        return None
    while (turned := turned_of(weight)) is not None:
        weight, transposed = turned, not transposed
    sizes = shape(weight)
    if sizes is None or len(sizes) != 2:
        return None
    fan_in, width = sizes if transposed else sizes[::-1]
    if not isinstance(width, int) or not isinstance(fan_in, int) or not width or not fan_in:  # empty ones are none
        return None
    if bias is not None and shape(bias) != (width,):
        return None
    return Projection(node, peel(source, Change.ROWS), weight, bias, transposed, None, width, fan_in)


def turned_of(weight: fx.Node) -> fx.Node | None:
    """The matrix that ``weight`` is the transpose of: ``w.t()``, ``w.T``, ``w.transpose(0, 1)``, ``w.permute``."""
    call = op(weight)
    source = call.node("input") if call is not None else None
    sizes = shape(source) if source is not None else None
    if call is None or sizes is None or len(sizes) != 2:
        return None
    dims = {
        "t": (0, 1),
        "transpose": (call.args.get("dim0"), call.args.get("dim1")),
        "permute": call.args.get("dims"),
    }.get(call.name)
    if not isinstance(dims, tuple | list) or len(dims) != 2 or not all(isinstance(dim, int) for dim in dims):
        return None
    places = [dim % 2 for dim in dims if isinstance(dim, int)]
    turned = sorted(places) == [0, 1] if call.name != "permute" else places == [1, 0]
    return source if turned else None


def _biased(node: fx.Node, call: Op, weights: Container[fx.Node]) -> Projection | None:
    """``x @ w + b`` in two steps."""
    for one, other in (("input", "other"), ("other", "input")):
        source, bias = call.node(one), call.node(other)
        if source is None or bias is None or bias not in weights:
            continue
        inner = projection(source, weights)
        if inner is not None and inner.bias is None and inner.rows is None and shape(bias) == (inner.width,):
            return replace(inner, output=node, bias=bias)
    return None


def mixes(node: fx.Node) -> bool:
    """Whether ``node`` mixes the features of a token or several tokens: a matrix product, in any spelling.

    A module that was not traced into does if it holds a matrix, and an op without a name here if it takes one.
    """
    module = called_module(node)
    if module is not None:
        return any(parameter.dim() > 1 for parameter in module.parameters())
    call = op(node)
    if call is not None or node.op != "call_function":
        return call is not None and call.name in MATMUL
    given = [value(source) for source in node.all_input_nodes]
    return any(isinstance(weight, nn.Parameter) and weight.dim() > 1 for weight in given)
