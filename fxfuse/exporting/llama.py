"""Whether a planned model is Llama-shaped, and if so its :class:`~fxfuse.exporting.layout.Layout`.

Told from the graph alone. What the graph of a short call does not tell (rotary angles far out, attention windows) is
in the model's config, and for the formats to look at.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from fxfuse.errors import ExportError
from fxfuse.exporting.attention import attention_of, linear_of
from fxfuse.exporting.layout import Attention, Block, GatedFFN, Layout, LinearAttention
from fxfuse.exporting.reading import norm_of, one_number
from fxfuse.exporting.stream import Planned
from fxfuse.exporting.weights import Expressions, Weight, filled
from fxfuse.exporting.wide import Part, joined, part_of
from fxfuse.ffn.affine import unfoldable
from fxfuse.ffn.projection import projection
from fxfuse.graph.ops import op
from fxfuse.graph.peel import PASSED, Change, layers
from fxfuse.graph.values import dtype
from fxfuse.plan import Member
from fxfuse.stream.branch import Branch


def llama_layout(planned: Planned) -> Layout:
    """The planned model as blocks.

    Raises:
        ExportError: it is not Llama-shaped; the message says where, and why.
    """
    return _Reader(planned).layout()


class _Reader:
    def __init__(self, planned: Planned) -> None:
        self._planned, self._branches = planned, planned.branches
        self._write = Expressions(planned.gm, planned.inputs, planned.names)
        self._eps: dict[float, str] = {}

    def layout(self) -> Layout:
        stream = self._planned.stream
        if len(stream.points) != len(stream.sums) + 1 or any(not each.stream.scale.is_one for each in stream.sums):
            raise ExportError("the stream itself is multiplied between layers, and Llama's is not")
        extra = next((term for each in stream.sums for term in each.extras), None)
        if extra is not None:
            raise ExportError(f"{extra.node.name} is added to the stream and is no branch: a Llama adds branches alone")
        blocks = self._blocks()
        embedding, norm, head = self._embedding(), *self._head()
        if len(self._eps) > 1:
            told = ", ".join(f"{eps:g} ({where})" for eps, where in self._eps.items())
            raise ExportError(f"its norms have different eps, and a Llama has one: {told}")
        return Layout(blocks, embedding, norm, None if head == embedding else head, next(iter(self._eps)))

    def _blocks(self) -> tuple[Block, ...]:
        blocks: list[Block] = []
        for members in self._planned.points:
            made = self._point([self._branch(member) for member in members])
            if not isinstance(made, GatedFFN):
                blocks.append(Block(made, None))
            elif blocks and blocks[-1].ffn is None:
                blocks[-1] = Block(blocks[-1].attention, made)
            else:
                blocks.append(Block(None, made))
        return tuple(blocks)

    def _branch(self, member: Member) -> Branch:
        if isinstance(member, str):
            return self._branches[member]
        raise ExportError(
            f"{' + '.join(member)} run on a copy of the stream of their own, and a Llama has but one stream: the "
            "format 'transformers' can say it"
        )

    def _point(self, branches: Sequence[Branch]) -> Attention | LinearAttention | GatedFFN:
        kinds = {"linear" if each.name in self._planned.plan.linear else each.kind for each in branches}
        if kinds == {"gated_ffn"}:
            return self._ffn([self._part(branch) for branch in branches])
        if len(branches) == 1 and kinds <= {"attention", "linear"}:
            reader = attention_of if kinds == {"attention"} else linear_of
            made, eps = reader(branches[0], self._planned, self._write)
            self._note(eps, branches[0].name)
            return made
        names = ", ".join(f"{each.name!r} ({each.kind})" for each in branches)
        together = "stand side by side" if len(branches) > 1 else "is there"
        raise ExportError(f"{names} {together}, and a layer of a Llama is one attention, then one gated FFN")

    def _part(self, branch: Branch) -> Part:
        part = part_of(branch, self._planned.plan)
        if isinstance(part, str):
            raise ExportError(f"{branch.name!r} is no FFN of a Llama: {part}")
        return part

    def _ffn(self, parts: Sequence[Part]) -> GatedFFN:
        """FFNs of one point as one. A single one keeps its norm; of several, gains go into gate and up."""
        first, alone = parts[0], len(parts) == 1
        names, width = tuple(part.branch.name for part in parts), first.ffn.down.width
        if len({part.activation.name for part in parts}) > 1:
            raise ExportError(f"{' and '.join(names)} have different activations, so they are not one FFN")
        for part in parts:
            affine, name = part.ffn.normed, part.branch.name
            norm = norm_of(affine.output, width, part.branch.read, self._planned, repr(name))
            self._note(norm.eps, name)
            if not alone and (rounding := unfoldable(affine)):
                raise ExportError(f"{name!r} cannot be a part of a wide FFN: {rounding}")
        wide = joined(parts, self._write, fold=not alone)
        if wide.up is None:
            raise ExportError(f"{names[0]!r} has hidden units that are not activation(gate) * up")
        given = wide.down.dtype
        gain = self._write.gain(first.ffn.normed.factor, width, given) if alone else filled(1.0, (width,), given)
        return GatedFFN(
            names,
            first.activation.name,
            gain,
            wide.gate,
            wide.up,
            wide.down,
            wide.gate_bias,
            wide.up_bias,
            wide.down_bias,
        )

    def _embedding(self) -> Weight:
        node, number = self._planned.stream.points[0], 1.0
        for taken in layers(node, PASSED | Change.NUMBER | Change.GAIN, self._planned.weights):
            node, number = taken.source, number * taken.scale.number
            if taken.weight is not None:
                number *= one_number(taken.weight, self._write, "what is embedded")
        call = op(node)
        weight = call.node("weight") if call is not None and call.name == "embedding" else None
        if weight is None or weight not in self._planned.weights:
            raise ExportError(f"the stream does not begin with embedded tokens but with {node.name}")
        return self._write.of(weight).times(number)

    def _head(self) -> tuple[Weight, Weight]:
        """The gain of the last norm, and the weights that make the logits."""
        planned = self._planned
        (output,) = planned.gm.graph.find_nodes(op="output")
        node, number = output.all_input_nodes[0], 1.0
        for taken in layers(node, PASSED | Change.NUMBER):
            node, number = taken.source, number * taken.scale.number
        logits = projection(node, planned.weights)
        if logits is None or logits.bias is not None:
            raise ExportError(f"the logits are not one linear map without a bias, but {node.name}")
        norm = norm_of(_whole(logits.input), logits.fan_in, planned.stream.points[-1], planned, "what makes the logits")
        self._note(norm.eps, "the last norm")
        given = dtype(logits.weight)
        assert given is not None
        return self._write.gain(norm.factor, logits.fan_in, given), self._write.rows(logits).times(number)

    def _note(self, eps: float, where: str) -> None:
        self._eps.setdefault(eps, where)


def _whole(node: fx.Node) -> fx.Node:
    """A value before it is cut to all of itself: the logits of all tokens are asked for."""
    while node.target is operator.getitem and isinstance(node.args[1], tuple):
        if any(cut is not Ellipsis and cut not in (slice(None), slice(0, None)) for cut in node.args[1]):
            break
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node
