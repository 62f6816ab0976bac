"""When parallel FFNs are one wide FFN: the same input but for gains, the same activation, the same dtypes."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxfuse.ffn.affine import NORMS
from fxfuse.ffn.anatomy import FFN, Normed, Projection
from fxfuse.ffn.quantized import Quantized
from fxfuse.graph.ops import op
from fxfuse.graph.peel import Change, peel
from fxfuse.graph.sharded import Reduction
from fxfuse.graph.value_numbering import Numbering
from fxfuse.graph.values import dtype, value
from fxfuse.passes.unlike import unlike
from fxfuse.stream.branch import Branch

NO_OTHER = "no other FFN of a form that can be made wide is added to the stream at the same place"

SHARED_QUANTIZED = "its weights are quantized, and weights='share' takes the memory of plain tensors only"

OWN_GAIN = (
    "its norm has a gain of its own, which cannot go into quantized weights: fxfuse.fold_gains(model, plan, ...) puts "
    "it into the weights before they are quantized"
)

TRANSPARENT = Change.COPY | Change.ROWS
"""What ops inside an FFN may do that changes no hidden unit; a wide FFN does without them."""


@dataclass(frozen=True)
class Form:
    """Equal for two FFNs exactly if their sum is one wide FFN: same input but for gains, same activation and dtypes.

    Attributes:
        reads: what the projections read, apart from gain and shift.
        activation: the function of a hidden unit, and of how many projections.
        multiplier: the symbolic numbers that its contribution is multiplied with.
        dtypes: of all that it computes with.
        reduction: the all-reduce that its contribution goes through.
        width: of what it adds.
        device: of its weights.
        quantized: how they are quantized, and the number that its contribution is multiplied with, which cannot go into
            quantized weights.
    """

    reads: Hashable
    activation: tuple[str, int]
    multiplier: tuple[fx.Node, ...]
    dtypes: tuple[torch.dtype | None, ...]
    reduction: Reduction | None
    width: int
    device: torch.device | None
    quantized: tuple[Quantized, float] | None


def form(branch: Branch, numbering: Numbering) -> Form:
    """The form of an FFN; ``numbering`` knows the points of the stream."""
    ffn = branch.ffn
    assert ffn is not None
    projections, constants = slots(ffn), constant_slots(ffn)
    places = {slot.output: index for index, slot in enumerate(projections)}
    places |= {constant: len(projections) + index for index, constant in enumerate(constants)}
    weights = [slot.weight for slot in (*projections, ffn.down)]
    known = value(ffn.down.weight)
    return Form(
        reads=numbering[projections[0].input] if ffn.quantized else bare_key(ffn.normed, numbering),
        activation=(_activation(ffn.down.input, places), len(projections)),
        multiplier=branch.scale.nodes,
        dtypes=tuple(map(dtype, (branch.terms[0].node, projections[0].input, *weights, *constants))),
        reduction=ffn.reduction,
        width=ffn.down.width,
        device=None if known is None else known.device,
        quantized=None if ffn.quantized is None else (ffn.quantized, branch.scale.number),
    )


def difference(branch: Branch, siblings: Sequence[Branch], numbering: Numbering) -> str:
    """Why ``branch`` does not become one with the other FFNs that are added at the same place."""
    others = [other for other in siblings if other.ffn is not None and other is not branch]
    if not others:
        return NO_OTHER
    own = form(branch, numbering)
    forms = {other.name: form(other, numbering) for other in others}
    if own in forms.values():
        return "its width differs, and weights='share' takes FFNs of one width only"
    same_input = {name: other_form for name, other_form in forms.items() if other_form.reads == own.reads}
    if any(other_form.multiplier != own.multiplier for other_form in same_input.values()):
        return "its multiplier is a symbolic number of its own; compile without dynamic=True"
    for name, other_form in same_input.items():
        if other_form.activation != own.activation:
            return f"its activation differs from that of {name}"
        if other_form.reduction != own.reduction:
            return f"its contribution is not all-reduced as that of {name} is"
        if other_form.dtypes != own.dtypes:
            return f"it computes in other dtypes than {name}"
        if other_form.quantized != own.quantized:
            return f"its weights are quantized in another way than those of {name}, or scaled by another number"
        if other_form.device != own.device:
            return f"its weights are on another device than those of {name}"
        return f"it adds a value of another width than {name}"
    same_point = next((other for other in others if other.read is branch.read), None)
    if gain := own_gain(branch, siblings, numbering):
        return gain
    if same_point is not None:
        return unlike(branch, same_point, numbering)
    return f"it reads another point of the stream than {others[0].name}"


def own_gain(branch: Branch, siblings: Sequence[Branch], numbering: Numbering) -> str:
    """Why quantized projections are not joined with those of an FFN that reads the same but for its norm's gain."""
    half = branch.gate_up
    if half is None or half.blocks is None:
        return ""
    others = [other.gate_up for other in siblings if other is not branch and other.gate_up is not None]
    alike = [other for other in others if bare_key(other.normed, numbering) == bare_key(half.normed, numbering)]
    inputs = {numbering[each.projections[0].input] for each in (half, *alike)}
    return OWN_GAIN if len(inputs) > 1 else ""


def bare_key(normed: Normed, numbering: Numbering) -> Hashable:
    """What the projections read, apart from gain and shift; a norm call counts by what it normalises and how."""
    call = op(normed.bare)
    source = call.node("input") if call is not None and call.name in NORMS else None
    if call is None or source is None:
        return numbering[normed.bare]
    if not normed.fused_call and (call.node("weight") is not None or call.node("bias") is not None):
        return numbering[normed.bare]
    sizes = call.args.get("shape")
    assert isinstance(sizes, list | tuple)
    key = tuple(numbering[size] if isinstance(size, fx.Node) else repr(size) for size in sizes)
    return (call.name, numbering[source], key, repr(call.args.get("eps")))


def _activation(node: fx.Node, leaves: dict[fx.Node, int], known: dict[fx.Node, str] | None = None) -> str:
    """The function of one hidden unit, an expression in projections and constants with views left out, as a digest.

    Of a digest of its operands, because a value that is read twice would be written out twice, and again in each.
    """
    known = {} if known is None else known
    node = peel(node, TRANSPARENT, within=lambda inner: inner not in leaves)
    if node in leaves:
        return f"leaf {leaves[node]}"
    if node not in known:
        call = op(node)
        assert call is not None
        arguments = {
            key: _activation(argument, leaves, known) if isinstance(argument, fx.Node) else repr(argument)
            for key, argument in call.args.items()
        }
        commutes = call.name in ("add", "mul") and "alpha" not in arguments
        expression = (call.name, sorted(arguments.values()) if commutes else list(arguments.items()))
        known[node] = hashlib.sha256(repr(expression).encode()).hexdigest()
    return known[node]


def slots(ffn: FFN) -> tuple[Projection, ...]:
    """The projections in an order that the spelling does not change: ``silu(g) * u`` and ``u * silu(g)`` agree."""
    by_output = {slot.output: slot for slot in ffn.projections}
    return tuple(by_output[node] for node in _leaves(ffn) if node in by_output)


def constant_slots(ffn: FFN) -> tuple[fx.Node, ...]:
    """What the activation takes of weights, in such an order."""
    return tuple(node for node in _leaves(ffn) if node in ffn.constants)


def _leaves(ffn: FFN) -> tuple[fx.Node, ...]:
    blind = {slot.output: 0 for slot in ffn.projections} | dict.fromkeys(ffn.constants, 1)
    ranked: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    known: dict[fx.Node, str] = {}

    def visit(node: fx.Node) -> None:
        if node in blind:
            ranked[node] = None
            return
        if node in seen:
            return
        seen.add(node)
        call = op(node)
        sources = list(node.all_input_nodes)
        if call is not None and call.name in ("add", "mul") and len(sources) == 2:
            sources.sort(key=lambda source: _activation(source, blind, known))
        for source in sources:
            visit(source)

    visit(ffn.down.input)
    return tuple(ranked)
