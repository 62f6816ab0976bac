"""Linear maps on a CPU over prepacked weights, those of one input as one: the option ``prepack`` of the backend.

oneDNN reads weights fastest in a layout of its own. Such a copy is one more packed weight
(`fxfuse.packing.expressions`): made once, true to the weights it was made from, and shared by all graphs that want it.
Linear maps that read one value (q, k and v; gate and up) become one over the rows of all: fewer calls, each closer to
the memory's bandwidth.

Exact: the same sums of products, formed in float32. Each is done only where it is measured to be faster.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, fx

from fxfuse.cpu import onednn
from fxfuse.cpu.gemm import gemm
from fxfuse.cpu.gemv import LEAST, MAX_ROWS, compiled_loops, loops_win
from fxfuse.cpu.race import Linear, aten, hint, linear_map, wins
from fxfuse.ffn.projection import Projection, projection
from fxfuse.graph.constant import weight_only
from fxfuse.graph.ops import op
from fxfuse.graph.order import sort
from fxfuse.graph.special import unpackable
from fxfuse.graph.surgery import erase_dead
from fxfuse.graph.values import parameters, value
from fxfuse.hardware.configs import Gemm
from fxfuse.packing import expressions as pack
from fxfuse.passes.base import Fusion, PassReport
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.emit.wide import slices
from fxfuse.passes.runner import run
from fxfuse.passes.verify import Claim
from fxfuse.stream.branch import Term

log = logging.getLogger(__name__)

MARGIN = 0.85
"""A copy of a weight must take less than this share of the time, so that it is worth its memory."""

_LINEAR_MAPS = ("linear", "matmul", "addmm")


@dataclass(frozen=True)
class Prepack(Fusion["_Joint"]):
    """See :func:`prepack`."""

    name, verb, done, product = "prepack", "prepack", "prepacked", "a linear map over a prepacked weight"

    def find(self, graph: Canonical, report: PassReport) -> list[_Joint]:
        names = parameters(graph.gm)
        groups: dict[Hashable, list[_Map]] = {}
        for mapped in _linear_maps(graph.graph, weight_only(graph.gm, names)):
            alone = mapped.node if mapped.source in graph.overwritten else None
            key = (mapped.source, mapped.size.dtype, graph.regions[mapped.node], alone)
            groups.setdefault(key, []).append(mapped)
        joints = [_Joint(tuple(names.get(m.map.weight, m.map.weight.name) for m in g), g) for g in groups.values()]
        return [joint for joint in joints if prepacked_wins(joint.size)]

    def write(self, graph: Canonical, rewrites: Sequence[_Joint]) -> Iterator[tuple[_Joint, Claim]]:
        order = {node: index for index, node in enumerate(graph.graph.nodes)}
        hazard, region = graph.hazards, graph.regions
        for joint in rewrites:
            first = min((mapped.node for mapped in joint.maps), key=order.__getitem__)
            made, parts = _write(graph.graph, first, joint.maps)
            sort(graph.graph, hazard, region)  # a weight may be an expression that the model writes down only later
            yield joint, Claim([([Term(part)], [Term(m.node)]) for m, part in zip(joint.maps, parts, strict=True)])
            _replace(graph.graph, made, parts, joint.maps)
        sort(graph.graph, hazard, region)
        taken = sum(joint.bytes for joint in rewrites)
        log.info("prepacked weights of this graph take %.1f MB beside the model's own", taken / 1e6)


def prepack(gm: fx.GraphModule) -> PassReport:
    """Let the linear maps of ``gm`` read prepacked weights, where that is faster on this machine.

    Args:
        gm: a graph of Dynamo, with its weights as inputs, that computes no gradients; its nodes know their sizes.

    Returns:
        the linear maps by their weights, and what their copies take.
    """
    return run(gm, Prepack())


@cache
def prepacked_wins(size: Gemm) -> bool:
    """Whether oneDNN over a prepacked weight is faster than every way over the weight as it is."""
    if not onednn.computes(size.dtype) or not _beats(gemm(size) or aten(size), size):
        return False
    return size.M > MAX_ROWS or not loops_win(size) or _beats(compiled_loops(size), size)


def _beats(champion: Linear, size: Gemm) -> bool:
    return wins(torch.ops.fxfuse.prepacked_linear, champion, size, onednn.prepack, MARGIN)


@dataclass(frozen=True)
class _Map:
    """A linear map: the op, what it reads, which rows of which weight it is made of, and its size."""

    node: fx.Node
    source: fx.Node
    map: Projection
    size: Gemm


@dataclass(frozen=True)
class _Joint:
    """Linear maps of one input that become one, by the names of their weights."""

    names: tuple[str, ...]
    maps: Sequence[_Map]

    @property
    def size(self) -> Gemm:
        size = self.maps[0].size
        return linear_map(size.M, size.K, sum(mapped.size.N for mapped in self.maps), size.dtype)

    @property
    def bytes(self) -> int:
        return self.size.N * self.size.K * self.size.dtype.itemsize

    @property
    def detail(self) -> str:
        return f"{self.size.N} x {self.size.K}, {self.bytes / 1e6:.1f} MB"


def _linear_maps(graph: fx.Graph, weights: Container[fx.Node]) -> list[_Map]:
    """Those of large weights that are inputs of the graph, or packed from such, in one dtype, on a CPU."""
    made: list[_Map] = []
    for node in graph.nodes:
        call = op(node)
        if call is None or call.name not in _LINEAR_MAPS:
            continue
        source, own, result = _source(node), projection(node, weights), value(node)
        if source is None or own is None or result is None or result.dim() < 2:
            continue
        if not all(weight is None or _from_inputs(weight) for weight in (own.weight, own.bias)):
            continue
        if unpackable((own.weight, own.bias)):
            continue
        if not all(_fits(value(operand), result) for operand in (source, own.weight)):
            continue
        rows = hint(result.numel() // own.width)
        if rows and own.fan_in * own.width >= LEAST:
            made.append(_Map(node, source, own, linear_map(rows, own.fan_in, own.width, result.dtype)))
    return made


def _source(node: fx.Node) -> fx.Node | None:
    """What the linear map ``node`` reads."""
    call = op(node)
    return call.node("input") if call is not None else None


def _fits(given: Tensor | None, result: Tensor) -> bool:
    """Whether a linear map reads ``given`` in the dtype of its result, on a CPU; under autocast it does not."""
    return given is not None and given.device.type == "cpu" and given.dtype == result.dtype


def _from_inputs(weight: fx.Node) -> bool:
    """Whether ``weight`` can be computed once for all calls: it is made of inputs of the graph alone."""
    stack = [weight]
    while stack:
        node = stack.pop()
        if node.op not in ("placeholder", "call_function", "call_method"):
            return False
        stack += node.all_input_nodes
    return True


def _write(graph: fx.Graph, first: fx.Node, group: Sequence[_Map]) -> tuple[fx.Node, list[fx.Node]]:
    """The maps of the group as one, in the place of the ``first``, and the part of its result that each has."""
    what = " + ".join(mapped.map.weight.name for mapped in group)
    with graph.inserting_before(first):
        rows = [pack.weight_of(graph, mapped.map) for mapped in group]
        whole = rows[0] if len(rows) == 1 else graph.call_function(torch.cat, (rows, 0))
        weight = graph.call_function(onednn.prepack, (whole,))
        weight.meta[pack.PACK] = f"prepacked {what}"
        biases = [pack.bias_of(graph, mapped.map) for mapped in group]
        bias = biases[0] if len(biases) == 1 else _bias(graph, group, biases, what)
        operands = (_source(group[0].node), weight, bias)  # what was read at first may have been replaced by now
        made = graph.call_function(torch.ops.fxfuse.prepacked_linear.default, operands)
        parts = slices(graph, made, [mapped.map.width for mapped in group])
        if len(parts) > 1:  # who reads them may count on dense rows, as those of a linear map are
            parts = [graph.call_method("contiguous", (part,)) for part in parts]
    return made, parts


def _replace(graph: fx.Graph, made: fx.Node, parts: Sequence[fx.Node], group: Sequence[_Map]) -> None:
    """Let the ``parts`` of the one map stand for those of the group."""
    inner = [weight for own in group for weight in (own.map.weight, own.map.bias) if weight is not None]
    for mapped, part in zip(group, parts, strict=True):
        part.meta.update(mapped.node.meta)
        mapped.node.replace_all_uses_with(part)
        erase_dead(graph, [mapped.node])
    for node in inner:  # what is packed from packed weights is made from theirs at once
        if pack.PACK in node.meta and len(node.users) == 1 and made not in node.users:
            del node.meta[pack.PACK]


def _bias(graph: fx.Graph, group: Sequence[_Map], biases: Sequence[fx.Node | None], what: str) -> fx.Node | None:
    if all(bias is None for bias in biases):
        return None
    filled = [
        pack.zeros_for(graph, mapped.map) if bias is None else bias for mapped, bias in zip(group, biases, strict=True)
    ]
    return pack.cat(graph, filled, 0, f"bias of {what}")
