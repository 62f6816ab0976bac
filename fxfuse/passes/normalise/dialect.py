"""Dialects: what tracers and authors write in words of their own, said in those that the recogniser knows. Exact.

| found | written |
|---|---|
| ``x.type_as(y)`` | ``x.to(dtype)`` |
| ``torch.addcmul(h, w, x)`` | ``h + w * x`` |
| ``torch.stack([h, f]).sum(0)`` | ``h + f`` |
| ``F.glu(x)`` | ``a, b = x.chunk(2, -1); a * sigmoid(b)`` |
| ``einsum("bsd,fd->bsf", x, w)`` | ``F.linear(x, w)``, or ``x @ w`` for ``"bsd,df->bsf"`` |
| ``x.unflatten(-1, (2, n))[..., 0, :]``, ``x.unflatten(-1, (n, 2))[..., 0]`` | ``x[..., 0:n:1]``, ``x[..., 0::2]`` |
| ``gain * x / std`` | ``gain * (x / std)`` |
| ``native_layer_norm(...)[0]``, ``_fused_rms_norm(...)[0]`` | ``F.layer_norm(...)``, ``F.rms_norm(...)`` |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from operator import getitem

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import Target

from fxfuse.graph.ops import Op, is_impure, is_random, op
from fxfuse.graph.order import overwritten
from fxfuse.graph.slices import is_last
from fxfuse.graph.surgery import erase_dead
from fxfuse.graph.values import dtype, last_dim, shape


def translate(graph: fx.Graph) -> list[str]:
    """Replace what stands in the table of this module; the names of the nodes that are gone.

    What make_fx leaves unused goes too: a second result of an attention would keep it in the graph that drops it.
    """
    for node in reversed(graph.nodes):
        if not node.users and op(node) is not None and not is_impure(node) and not is_random(node):
            graph.erase_node(node)
    gone: list[str] = []
    rewritten = overwritten(graph)
    for node in list(graph.nodes):
        before = node.prev
        with graph.inserting_before(node):
            made = _translated(graph, node)
        if made is None:
            continue
        if rewritten and _reads_later(made, node, before, rewritten):
            erase_dead(graph, [made])
            continue
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        erase_dead(graph, [node])
        gone.append(node.name)
    return gone


def _reads_later(made: fx.Node, node: fx.Node, before: fx.Node, rewritten: Container[fx.Node]) -> bool:
    """Whether ``made``, all of it written between ``before`` and ``node``, reads what was overwritten before ``node``.

    ``node`` itself reads its operands there; those of its operands it does not, and they may have changed since.
    """
    new, own = before.next, set(node.all_input_nodes)
    while new is not node:
        if any(source in rewritten and source not in own for source in new.all_input_nodes):
            return True
        new = new.next
    return False


def _translated(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """What stands for ``node``, written at the insertion point; None if it may stay as it is."""
    if node.target is getitem and (normed := _norm(graph, node)) is not None:
        return normed
    call = op(node)
    if call is None:
        return None
    if call.name in ("getitem", "select"):
        return _part(graph, node, call)
    if call.name in ("mul", "div"):
        return _gain_last(graph, node, call)
    source = call.node("input")
    if call.name == "cast" and len(node.all_input_nodes) > 1:
        return graph.call_method("to", (source, call.args["dtype"]))
    if call.name == "addcmul":
        return _addcmul(graph, node, call)
    if call.name == "sum" and source is not None:
        return _sum_of_stack(graph, node, call, source)
    if call.name == "glu" and source is not None and is_last(call.args.get("dim", -1), source):
        return _glu(graph, source)
    return _product(graph, node) if call.name == "einsum" else None


def _addcmul(graph: fx.Graph, node: fx.Node, call: Op) -> fx.Node | None:
    """As a product and a sum, so that a residual add is seen."""
    start, pair = call.node("input"), [call.node("tensor1"), call.node("tensor2")]
    whole = next((each for each in pair if each is not None and shape(each) == shape(node)), None)
    if start is None or None in pair or whole is None or dtype(whole) != dtype(node):
        return None
    product = graph.call_function(torch.mul, tuple(pair))
    product.meta = dict(node.meta)
    factor = call.args.get("value", 1)
    return graph.call_function(torch.add, (start, product), {} if factor == 1 else {"alpha": factor})


def _sum_of_stack(graph: fx.Graph, node: fx.Node, call: Op, source: fx.Node) -> fx.Node | None:
    """As adds. Of more than two in half precision a sum rounds once, and adds would each time."""
    dim, kind, sizes = call.args.get("dim"), dtype(node), shape(source)
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    if not isinstance(dim, int) or sizes is None or call.args.get("keepdim", False) is not False:
        return None
    parts = _stacked(source, dim % len(sizes))
    if kind is None or not kind.is_floating_point or any(dtype(part) != kind for part in parts):
        return None
    if len(parts) < 2 or (len(parts) > 2 and kind.itemsize < 4):
        return None
    made, *others = parts
    for part in others:
        made = graph.call_function(torch.add, (made, part))
        made.meta = dict(node.meta)
    return made


def _stacked(node: fx.Node, dim: int) -> list[fx.Node]:
    """What ``node`` is a stack of along ``dim``; torch.export's decompositions write one with ``cat``."""
    call, sizes = op(node), shape(node)
    if call is None or sizes is None:
        return []
    if call.name == "stack":
        return _joined(call, dim, len(sizes))
    if call.name == "cat":
        return [row for part in _joined(call, dim, len(sizes)) if (row := _unsqueezed(part, dim, len(sizes)))]
    joined = op(source) if call.name == "view" and (source := call.node("input")) is not None else None
    rows = _joined(joined, dim, len(sizes) - 1) if joined is not None and joined.name == "cat" else []
    rest = (*sizes[:dim], *sizes[dim + 1 :])
    return rows if len(rows) == sizes[dim] and all(shape(each) == rest for each in rows) else []


def _joined(call: Op, dim: int, rank: int) -> list[fx.Node]:
    """The operands of a stack or a cat, if it is one along ``dim``."""
    place, parts = call.args.get("dim", 0), call.args.get("tensors")
    along = isinstance(place, int) and place % rank == dim
    return [part for part in parts if isinstance(part, fx.Node)] if along and isinstance(parts, list | tuple) else []


def _unsqueezed(node: fx.Node, dim: int, rank: int) -> fx.Node | None:
    call = op(node)
    place = call.args.get("dim") if call is not None and call.name == "unsqueeze" else None
    return call.node("input") if call is not None and isinstance(place, int) and place % rank == dim else None


def _glu(graph: fx.Graph, source: fx.Node) -> fx.Node:
    halves = graph.call_function(torch.chunk, (source, 2, -1))
    value, gate = (graph.call_function(getitem, (halves, index)) for index in (0, 1))
    opened = graph.call_function(torch.sigmoid, (gate,))
    for key in ("example_value", "val"):
        known = source.meta.get(key)
        if isinstance(known, torch.Tensor):
            halves.meta[key] = known.chunk(2, -1)
            value.meta[key] = gate.meta[key] = opened.meta[key] = halves.meta[key][0]
    return graph.call_function(torch.mul, (value, opened))


def _part(graph: fx.Graph, node: fx.Node, call: Op) -> fx.Node | None:
    """A part of the last dimension, picked from that dimension made two: a half, or every other number."""
    picked = _picked(call)
    split = op(picked[0]) if picked is not None else None
    source = split.node("input") if split is not None and split.name in ("view", "unflatten") else None
    if picked is None or source is None:
        return None
    whole, axis, index = picked
    inner, outer = shape(whole), shape(source)
    if inner is None or outer is None or len(inner) != len(outer) + 1 or inner[:-2] != outer[:-1]:
        return None
    count, width = inner[-2:]
    axis = axis - len(inner) if axis >= 0 else axis
    if not isinstance(count, int) or not isinstance(width, int) or axis not in (-1, -2):
        return None
    index %= count if axis == -2 else width
    rows = (index * width, (index + 1) * width, 1) if axis == -2 else (index, count * width, width)
    return graph.call_function(torch.ops.aten.slice.Tensor, (source, -1, *rows))


def _picked(call: Op) -> tuple[fx.Node, int, int] | None:
    """``(x, dimension, index)`` if the op takes one of what ``x`` has along a dimension: ``x[..., 0, :]``, unbind."""
    source, index = call.node("input"), call.args.get("index")
    dim: object = call.args.get("dim")
    if call.name == "getitem" and isinstance(index, int):
        parts = op(source) if source is not None else None
        if parts is None or parts.name != "unbind":
            return None
        source, dim = parts.node("input"), parts.args.get("dim", 0)
    elif call.name == "getitem":
        everything = slice(None)
        if not isinstance(index, tuple) or index[:1] != (Ellipsis,) or any(i != everything for i in index[2:]):
            return None
        dim, index = 1 - len(index), index[1] if len(index) > 1 else None
    if source is None or not isinstance(dim, int) or not isinstance(index, int):
        return None
    return source, dim, index


def _gain_last(graph: fx.Graph, node: fx.Node, call: Op) -> fx.Node | None:
    """``gain * x`` divided by, or times, one number a row: with the gain last, as a norm has it that is written out."""
    if call.name == "div" and "rounding_mode" in call.args:
        return None
    one, other = call.node("input"), call.node("other")
    for product, row in ((one, other), (other, one))[: 2 if call.name == "mul" else 1]:
        scaled = op(product) if product is not None else None
        if product is None or row is None or scaled is None or scaled.name != "mul" or len(product.users) > 1:
            continue
        for key, rest in (("input", "other"), ("other", "input")):
            gain, x = scaled.node(key), scaled.node(rest)
            if gain is None or x is None or not _is_gain(gain, x, node) or last_dim(row) != 1 or dtype(row) != dtype(x):
                continue
            made = graph.call_function(torch.div if call.name == "div" else torch.mul, (x, row))
            made.meta = dict(node.meta)
            return graph.call_function(torch.mul, (made, gain))
    return None


def _is_gain(gain: fx.Node, x: fx.Node, node: fx.Node) -> bool:
    """Whether ``gain`` is a vector over the last dimension of ``x``, and all are of one dtype."""
    sizes, full = shape(gain), shape(node)
    if sizes is None or full is None or len(full) < 2 or shape(x) != full or sizes != full[-1:] or sizes == (1,):
        return False
    return dtype(gain) == dtype(x) == dtype(node)


_TERM = r"((?:\.\.\.)?[A-Za-z]+)"
_EQUATION = re.compile(rf"{_TERM},{_TERM}->{_TERM}")


def _product(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``einsum`` of a value and a matrix over the value's last dimension."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    match = _EQUATION.fullmatch(equation.replace(" ", "")) if isinstance(equation, str) else None
    if match is None or len(operands) != 2 or node.kwargs:
        return None
    *terms, out = match.groups()
    for value, matrix in ((0, 1), (1, 0)):
        x, w = terms[value], terms[matrix]
        if len(w) != 2 or len(set(x.lstrip("."))) < len(x.lstrip(".")) or out[:-1] != x[:-1]:
            continue
        summed, made = x[-1], out[-1]
        if made in x or summed == "." or w not in (made + summed, summed + made):
            continue
        function = F.linear if w == made + summed else torch.matmul
        return graph.call_function(function, (operands[value], operands[matrix]))
    return None


_NORMS: dict[Target, Callable[..., object]] = {
    torch.ops.aten.native_layer_norm.default: F.layer_norm,
    torch.ops.aten._fused_rms_norm.default: F.rms_norm,
}


def _norm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The normalised value among the results of a norm, whose other results, for a backward, nobody reads."""
    call, index = node.args
    if not isinstance(call, fx.Node) or call.target not in _NORMS or index != 0 or call.kwargs:
        return None
    if set(call.users) != {node}:
        return None
    return graph.call_function(_NORMS[call.target], call.args)
