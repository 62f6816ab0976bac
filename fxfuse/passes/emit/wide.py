"""Writing a wide FFN into a graph: one GEMM over folded weights, or a batch of GEMMs over the weights as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx

from fxfuse.ffn.affine import Factor
from fxfuse.ffn.anatomy import FFN, GateUp, Normed, Projection
from fxfuse.graph.ops import op
from fxfuse.graph.peel import layer
from fxfuse.graph.scale import Scale
from fxfuse.graph.sharded import reduced
from fxfuse.graph.slices import Rows
from fxfuse.graph.values import Dim, dtype, shape
from fxfuse.packing import expressions as pack
from fxfuse.passes.compatible import TRANSPARENT, constant_slots, slots
from fxfuse.passes.emit.kernel import ALIGNMENT, Kernel, call_kernel, gate_first
from fxfuse.stream.branch import STAMP, Branch


def emit_wide(graph: fx.Graph, branches: Sequence[Branch], stream: fx.Node, kernel: Kernel | None = None) -> fx.Node:
    """The sum of ``branches``, FFNs of one form, as one FFN; written at the insertion point. Returns its contribution.

    It has the sizes of ``stream``, which it is to be added to.
    ``down(middle(W x))`` with ``W`` the gate rows of all and then the up rows of all, each times its own norm's gain;
    in ATen, or as one call of fxfuse's ``kernel``.
    """
    ffns, names = _ffns(branches)
    columns = list(zip(*map(slots if kernel is None else gate_first, ffns), strict=True))
    width = sum(ffn.projections[0].width for ffn in ffns)
    padding = 0 if kernel is None else -width % ALIGNMENT
    weight = _rows_of(graph, ffns, columns, padding, names)
    bias = _biases_of(graph, ffns, columns, padding, names)
    common, factors = _scales(branches)
    own = [
        pack.scaled(graph, pack.gained(graph, pack.weight_of(graph, ffn.down), ffn.gains, ffn.down.weight, True), by)
        for ffn, by in zip(ffns, factors, strict=True)
    ]
    down = pack.cat(graph, [*own, *pack.zeros(graph, own[0], 1, padding)], 1, f"down of {names}")
    down_bias = _down_bias(graph, ffns, factors, names)
    if kernel is not None:
        source, eps = kernel.norm or (_shared_input(graph, ffns[0].normed, ffns[0].projections[0]), None)
        node = call_kernel(graph, kernel, source, weight, bias, down, down_bias, eps)
        return _contribution(graph, node, branches, common, shape(source), stream)
    first = ffns[0].projections[0]
    source = first.input if ffns[0].quantized else _shared_input(graph, ffns[0].normed, first)
    wide = graph.call_function(F.linear, (source, weight, bias))
    hidden = _middle(graph, ffns[0], slices(graph, wide, [width] * len(columns)), _constants(graph, ffns, names))
    node = graph.call_function(F.linear, (hidden, down, down_bias))
    return _contribution(graph, node, branches, common, shape(ffns[0].normed.bare), stream)


def _rows_of(
    graph: fx.Graph, ffns: Sequence[FFN], columns: Sequence[Sequence[Projection]], padding: int, names: str
) -> fx.Node:
    """The first rows of all FFNs, then the second ones, each column of them padded with so many rows of zeros."""
    parts: list[fx.Node] = []
    for column in columns:
        own = [pack.weight_of(graph, slot, _factor(ffn)) for ffn, slot in zip(ffns, column, strict=True)]
        parts += [*own, *pack.zeros(graph, own[0], 0, padding)]
    return pack.cat(graph, parts, 0, f"projections of {names}")


def _biases_of(
    graph: fx.Graph, ffns: Sequence[FFN], columns: Sequence[Sequence[Projection]], padding: int, names: str
) -> fx.Node | None:
    """Their biases, a norm's shift included, in the same order; zeros for those who have none, None if nobody has."""
    order = [(ffn, slot) for column in columns for ffn, slot in zip(ffns, column, strict=True)]
    biases = [pack.bias_of(graph, slot, () if ffn.quantized else ffn.normed.shifts) for ffn, slot in order]
    filled = _filled(graph, biases, [slot for _, slot in order])
    if not filled:
        return None
    count = len(ffns)
    padded = [
        part
        for start in range(0, len(filled), count)
        for part in (*filled[start : start + count], *pack.zeros(graph, filled[start], 0, padding))
    ]
    return pack.cat(graph, padded, 0, f"projection bias of {names}")


def _factor(ffn: FFN) -> Factor:
    """What goes into the rows of its projections; nothing, where these are quantized: they read the gain's product."""
    return pack.ONE if ffn.quantized else ffn.normed.factor


def emit_batched(graph: fx.Graph, branches: Sequence[Branch], stream: fx.Node) -> fx.Node:
    """The same sum, for FFNs of one width, over weights that are stacked and otherwise left as they are.

    Two batches of n GEMMs: ``[n, ..., d] x [n, 2f, d]`` and ``[n, ..., f] x [n, d, f]``, then a sum over n.
    """
    ffns, names = _ffns(branches)
    order = _row_order(ffns)
    count, own = len(ffns), [[slots(ffn)[index] for index in order] for ffn in ffns]
    flat = [slot for each in own for slot in each]
    weights = [part for each in own for part in _rows(graph, each)]
    stacked = pack.cat(graph, weights, 0, f"projections of {names}")
    sources = graph.call_function(torch.stack, ([ffn.projections[0].input for ffn in ffns],))
    batched = graph.call_function(torch.einsum, ("n...d,nfd->n...f", sources, _batch(graph, stacked, count)))
    bias = _biases(graph, [pack.bias_of(graph, slot) for slot in flat], flat, names)
    # [n * 2f] as [n, 1, 1, 2f]: the branches lead, tokens are in between.
    shaped = (count, *[1] * (len(shape(ffns[0].projections[0].input) or ()) - 1), -1)
    if bias is not None:
        batched = graph.call_function(torch.add, (batched, graph.call_method("view", (bias, shaped))))
    outputs = dict(zip(order, slices(graph, batched, [slot.width for slot in own[0]]), strict=True))
    constants = [graph.call_method("view", (each, shaped)) for each in _constants(graph, ffns, names)]
    hidden = _middle(graph, ffns[0], [outputs[index] for index in range(len(order))], constants)
    common, factors = _scales(branches)
    rows = [pack.scaled(graph, pack.weight_of(graph, ffn.down), by) for ffn, by in zip(ffns, factors, strict=True)]
    down = _batch(graph, pack.cat(graph, rows, 0, f"down of {names}"), count)
    parts = graph.call_function(torch.einsum, ("n...f,ndf->n...d", hidden, down))
    if any(ffn.gains for ffn in ffns):
        gains = pack.cat(graph, [_gain(graph, ffn) for ffn in ffns], 0, f"output gains of {names}")
        parts = graph.call_function(torch.mul, (parts, graph.call_method("view", (gains, shaped))))
    node = graph.call_function(torch.sum, (parts, 0))
    down_bias = _down_bias(graph, ffns, factors, names)
    if down_bias is not None:
        node = graph.call_function(torch.add, (node, down_bias))
    return _contribution(graph, node, branches, common, shape(ffns[0].projections[0].input), stream)


def emit_projections(
    graph: fx.Graph, first: GateUp, halves: Sequence[GateUp], folded: bool, names: str
) -> list[fx.Node]:
    """The projections of several FFNs as one GEMM, written at the insertion point; their outputs in order.

    They read what ``first`` reads: its very input, or if gains are ``folded``, that without the gain of its norm.
    """
    order = [(half.normed, projection) for half in halves for projection in half.projections]
    projections = [projection for _, projection in order]
    weights = [pack.weight_of(graph, p, normed.factor if folded else pack.ONE) for normed, p in order]
    biases = [pack.bias_of(graph, p, normed.shifts if folded else ()) for normed, p in order]
    bias = _biases(graph, biases, projections, names)
    weight = pack.cat(graph, weights, 0, f"projections of {names}")
    source = first.projections[0].input
    source = _shared_input(graph, first.normed, first.projections[0]) if folded else source
    made = graph.call_function(F.linear, (source, weight, bias))
    parts = slices(graph, made, [projection.width for projection in projections])
    return [
        part if _keeps_leading(half, projection, folded) else graph.call_method("flatten", (part, 0, -2))
        for part, (half, projection) in zip(parts, _each(halves), strict=True)
    ]


def can_be_given_the_shape_of(projection: Projection, half: GateUp, folded: bool) -> bool:
    """Whether :func:`emit_projections` can write the projection in the shape it has: its input's, or two dimensions."""
    sizes = shape(projection.output)
    return _keeps_leading(half, projection, folded) or (sizes is not None and len(sizes) == 2)


def _keeps_leading(half: GateUp, projection: Projection, folded: bool) -> bool:
    """Whether the leading dimensions of a projection are those of what it is computed from."""
    read, made = shape(half.normed.bare if folded else half.projections[0].input), shape(projection.output)
    return read is None or made is None or read[:-1] == made[:-1]


def _each(halves: Sequence[GateUp]) -> list[tuple[GateUp, Projection]]:
    return [(half, projection) for half in halves for projection in half.projections]


def _ffns(branches: Sequence[Branch]) -> tuple[list[FFN], str]:
    return [branch.ffn for branch in branches if branch.ffn is not None], " + ".join(branch.name for branch in branches)


def _row_order(ffns: Sequence[FFN]) -> list[int]:
    """The order of the slots' rows in a batch: as in the first packed weight, so that packed weights stay whole."""
    for own in map(slots, ffns):
        starts = [slot.rows.start for slot in own if slot.rows is not None]
        if len({slot.weight for slot in own}) == 1 and len(starts) == len(own):
            return sorted(range(len(own)), key=starts.__getitem__)
    return list(range(len(slots(ffns[0]))))


def _rows(graph: fx.Graph, own: Sequence[Projection]) -> list[fx.Node]:
    """The weights of an FFN's projections, top to bottom; a packed one that holds them in this order stays whole."""
    starts = [sum(slot.width for slot in own[:index]) for index in range(len(own))]
    whole = [Rows(start, start + slot.width) for start, slot in zip(starts, own, strict=True)]
    if len({slot.weight for slot in own}) == 1 and not own[0].transposed and [slot.rows for slot in own] == whole:
        return [own[0].weight]
    return [pack.weight_of(graph, slot) for slot in own]


def _batch(graph: fx.Graph, stacked: fx.Node, count: int) -> fx.Node:
    return graph.call_method("unflatten", (stacked, 0, (count, -1)))


def _biases(
    graph: fx.Graph, parts: Sequence[fx.Node | None], projections: Sequence[Projection], names: str
) -> fx.Node | None:
    """The biases end to end, zeros for those who have none; None if nobody has one."""
    filled = _filled(graph, parts, projections)
    return pack.cat(graph, filled, 0, f"projection bias of {names}") if filled else None


def _filled(graph: fx.Graph, parts: Sequence[fx.Node | None], projections: Sequence[Projection]) -> list[fx.Node]:
    """``parts`` with zeros for those who have no bias; none at all if nobody has one."""
    if all(part is None for part in parts):
        return []
    return [
        part if part is not None else pack.zeros_for(graph, projection)
        for part, projection in zip(parts, projections, strict=True)
    ]


def _down_bias(graph: fx.Graph, ffns: Sequence[FFN], factors: Sequence[float], names: str) -> fx.Node | None:
    biases = [
        pack.scaled(graph, pack.gained(graph, bias, ffn.gains, ffn.down.weight, False), by)
        for ffn, by in zip(ffns, factors, strict=True)
        if (bias := pack.bias_of(graph, ffn.down)) is not None
    ]
    return pack.total(graph, biases, f"down bias of {names}") if biases else None


def _gain(graph: fx.Graph, ffn: FFN) -> fx.Node:
    """What the output of an FFN is multiplied with, ``[d]``."""
    node = graph.call_function(torch.ones_like, (pack.column_of(graph, ffn.down),))
    for gain in ffn.gains:
        node = graph.call_function(torch.mul, (node, pack.vector(graph, gain)))
    return node


def _constants(graph: fx.Graph, ffns: Sequence[FFN], names: str) -> list[fx.Node]:
    """What the members' activations take of weights, ``[units of all]`` each."""
    columns = zip(*map(constant_slots, ffns), strict=True)
    return [
        pack.cat(
            graph,
            [pack.spread(graph, each, ffn.projections[0].width) for ffn, each in zip(ffns, column, strict=True)],
            0,
            f"activation of {names}",
        )
        for column in columns
    ]


def _scales(branches: Sequence[Branch]) -> tuple[Scale, list[float]]:
    """A common factor of the contributions, to be applied once, and what is left for each branch's weights."""
    scales = [branch.scale for branch in branches]
    if len(set(scales)) == 1:
        return scales[0], [1.0] * len(scales)
    return Scale(1.0, scales[0].nodes), [scale.number for scale in scales]


def slices(graph: fx.Graph, node: fx.Node, widths: Sequence[int]) -> list[fx.Node]:
    """``node`` cut along its last dimension."""
    if len(widths) == 1:
        return [node]
    starts = [sum(widths[:index]) for index in range(len(widths))]
    return [
        graph.call_function(torch.narrow, (node, -1, start, width)) for start, width in zip(starts, widths, strict=True)
    ]


def _shared_input(graph: fx.Graph, normed: Normed, reader: Projection) -> fx.Node:
    """The value that all members' projections read once gains and shifts are folded, in the dtype they read it in."""
    node = normed.bare
    made = dtype(node)
    if normed.fused_call:
        found = op(node)
        assert found is not None
        function = F.rms_norm if found.name == "rms_norm" else F.layer_norm
        eps = {"eps": found.args["eps"]} if found.args.get("eps") is not None else {}
        node = graph.call_function(function, (found.args["input"], found.args["shape"]), eps)
        _like(node, normed.bare)
    wanted = dtype(reader.input) or dtype(reader.weight)  # a linear map takes no other dtype than its weight's
    return node if wanted is None or wanted == made else graph.call_method("to", (node, wanted))


def _like(node: fx.Node, known: fx.Node) -> None:
    """Let ``node`` have the sizes and dtype of ``known``."""
    node.meta.update((key, known.meta[key]) for key in ("example_value", "val") if key in known.meta)


def _middle(graph: fx.Graph, ffn: FFN, outputs: Sequence[fx.Node], constants: Sequence[fx.Node]) -> fx.Node:
    """The first FFN's activation, on the hidden units of all."""
    new = dict(zip((slot.output for slot in slots(ffn)), outputs, strict=True))
    new |= zip(constant_slots(ffn), constants, strict=True)
    for node in ffn.middle:
        if (taken := layer(node, TRANSPARENT)) is not None:
            new[node] = new[taken.source]
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
            new[node].meta = {}
    return new[ffn.down.input]


def _contribution(
    graph: fx.Graph,
    node: fx.Node,
    branches: Sequence[Branch],
    common: Scale,
    inner: tuple[Dim, ...] | None,
    stream: fx.Node,
) -> fx.Node:
    """``node``, made of a value of sizes ``inner``, in the shape, dtype and scale of the members' contributions.

    Where those are all-reduced it is, once for all: an all-reduce is linear.
    """
    first = branches[0]
    assert first.ffn is not None
    outer = shape(first.terms[0].node)
    made = dtype(first.ffn.down.output)
    if (how := first.ffn.reduction) is not None:
        if how.dtype is not None and how.dtype != made:
            node, made = graph.call_method("to", (node, how.dtype)), how.dtype
        node = reduced(graph, node, how)
    if inner is not None and outer is not None and inner[:-1] != outer[:-1]:
        node = graph.call_method("reshape_as", (node, stream))
    wanted = dtype(first.terms[0].node)
    if wanted is not None and wanted != made:
        node = graph.call_method("to", (node, wanted))
    node = pack.scaled(graph, node, common.number)
    for factor in common.nodes:
        node = graph.call_function(torch.mul, (node, factor))
    term = first.terms[0].node
    _like(node, term)
    node.meta[STAMP] = " + ".join(branch.name for branch in branches)
    return node
