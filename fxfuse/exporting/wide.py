"""FFNs of one point as the weights of one: rows of gates and ups stacked, columns of downs, gains folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxfuse._common.units import Units
from fxfuse.errors import ExportError
from fxfuse.exporting.weights import Expressions, Weight, added, filled, stacked
from fxfuse.ffn.activation import Activation, activation_of
from fxfuse.ffn.anatomy import FFN
from fxfuse.ffn.projection import Projection
from fxfuse.packing.expressions import ONE
from fxfuse.plan import Plan
from fxfuse.stream.branch import Branch


@dataclass(frozen=True)
class Part:
    """An FFN that can be a part of a wide one, the function of its hidden units, and which it keeps: None for all."""

    branch: Branch
    ffn: FFN
    activation: Activation
    units: Units | None = None


@dataclass(frozen=True)
class Wide:
    """Weights of one FFN; ``up`` is None where hidden units are ``activation(gate)`` alone."""

    gate: Weight
    up: Weight | None
    down: Weight
    gate_bias: Weight | None
    up_bias: Weight | None
    down_bias: Weight | None


def part_of(branch: Branch, plan: Plan) -> Part | str:
    """The FFN that a branch is under a plan, or why it can be no part of a wide one."""
    if branch.ffn is None:
        return branch.reason
    if branch.ffn.quantized is not None:
        return "its weights are quantized: export the model first, and quantize what was exported"
    if branch.scale.nodes:
        return "it is multiplied with a symbolic number: trace without dynamic=True"
    activation = activation_of(branch.ffn)
    if activation is None:
        return "its activation has no name here"
    units = plan.narrow.get(branch.name)
    has_left = units is not None and len(units) == branch.ffn.projections[0].width
    return Part(branch, branch.ffn, activation, None if has_left else units)


def joined(parts: Sequence[Part], write: Expressions, fold: bool, over: float = 1.0) -> Wide:
    """The sum of FFNs of one input, as one.

    Args:
        parts: FFNs of one activation that read one value, but for the gains and shifts of their norms.
        write: makes the weights.
        fold: fold those gains and shifts into the projections; a norm alone does what is left.
        over: what is multiplied with the sum later on, and so is divided out here.
    """
    gates, ups = [part.activation.gate for part in parts], [part.activation.up for part in parts]
    have = [up for up in ups if up is not None]
    if len(have) not in (0, len(parts)):
        raise ExportError(f"of {', '.join(part.branch.name for part in parts)} some are gated, and some are not")
    downs, biases = list[Weight](), list[Weight]()
    for part in parts:
        number = part.branch.scale.number / over
        downs.append(write.rows(part.ffn.down, ONE, part.ffn.gains).times(number).kept(1, part.units))
        if (bias := write.bias(part.ffn.down, (), part.ffn.gains)) is not None:
            biases.append(bias.times(number))
    return Wide(
        _rows(gates, parts, write, fold),
        _rows(have, parts, write, fold) if have else None,
        stacked(downs, 1),
        _biases(gates, parts, write, fold),
        _biases(have, parts, write, fold) if have else None,
        added(biases) if biases else None,
    )


def _rows(own: Sequence[Projection], parts: Sequence[Part], write: Expressions, fold: bool) -> Weight:
    pairs = zip(own, parts, strict=True)
    return stacked(
        [write.rows(each, part.ffn.normed.factor if fold else ONE).kept(0, part.units) for each, part in pairs]
    )


def _biases(own: Sequence[Projection], parts: Sequence[Part], write: Expressions, fold: bool) -> Weight | None:
    """Biases end to end, zeros for those who have none; None if nobody has one."""
    pairs = zip(own, parts, strict=True)
    made = [write.bias(each, part.ffn.normed.shifts if fold else ()) for each, part in pairs]
    like = next((bias for bias in made if bias is not None), None)
    if like is None:
        return None
    return stacked(
        [
            (filled(0.0, (each.width,), like.dtype) if bias is None else bias).kept(0, part.units)
            for bias, each, part in zip(made, own, parts, strict=True)
        ]
    )
