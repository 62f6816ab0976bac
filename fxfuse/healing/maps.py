"""The linear maps by which branches write to the stream, found in any graph: these are what is fitted."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxfuse._common.units import Units
from fxfuse.ffn.projection import projection, turned_of
from fxfuse.graph.peel import PASSED, Change, layers
from fxfuse.graph.rerun import Values
from fxfuse.graph.scale import Scale
from fxfuse.healing.output_norm import OutputNorm, output_norm
from fxfuse.packing.expressions import kept_of
from fxfuse.stream.branch import STAMP, Branch, Term


@dataclass(frozen=True)
class LinearMap:
    """``scale * (weight @ input + bias)``: the last step of a branch on its way to the stream.

    Attributes:
        branch: its name.
        input: node, ``[..., fan_in]``.
        weight: placeholder of a parameter, ``[d, fan_in]``, or ``[fan_in, d]`` if ``transposed``.
        units: which of the parameter's inputs the map reads, if a plan has narrowed it; ``fan_in`` is their number.
        bias: placeholder of a parameter ``[d]``, or None.
        scale: numbers that multiply the output on its way to the stream.
        norm: of the output, if one follows: the map's change is then linear at the lengths that its outputs have.
    """

    branch: str
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    fan_in: int
    scale: Scale
    units: Units | None = None
    norm: OutputNorm | None = None

    @property
    def parameters(self) -> tuple[fx.Node, ...]:
        gain = None if self.norm is None else self.norm.gain
        return tuple(node for node in (self.weight, self.bias, gain) if node is not None)

    def inputs(self, values: Values) -> Tensor:
        """The input as the stream feels it, times the scale: ``[..., fan_in]``, or with a 1 for the bias after it."""
        inputs = values[self.input]
        assert isinstance(inputs, Tensor)
        if self.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1)
        for factor in (self.scale.number, *(values[node] for node in self.scale.nodes)):
            inputs = inputs * factor  # type: ignore[operator]  # a number, or a tensor of one
        return inputs if self.norm is None else inputs / self.norm.lengths(self._output(values))

    def _output(self, values: Values) -> Tensor:
        """``weight @ input + bias``."""
        input, weight, bias = (None if n is None else values[n] for n in (self.input, self.weight, self.bias))
        assert isinstance(input, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        return F.linear(input, weight.T if self.transposed else weight, bias)

    @property
    def columns(self) -> int:
        """How many numbers :meth:`inputs` has for each token."""
        return self.fan_in + (self.bias is not None)

    def changed(self, change: Tensor, values: Values) -> dict[fx.Node, Tensor]:
        """The parameters after ``change``, ``[d, columns]``; of the dtypes that they have."""
        if self.norm is not None:
            return self._normed(self.norm, change, values)
        weight, bias = change[:, : self.fan_in], change[:, self.fan_in :]
        made = {self.weight: weight.T if self.transposed else weight}
        if self.bias is not None:
            made[self.bias] = bias.squeeze(-1)
        olds = {node: values[node] for node in made}
        old = olds[self.weight]
        if self.units is not None and isinstance(old, Tensor):  # the others stay, and the plan has no use for them
            places = torch.tensor(self.units, device=weight.device)
            whole = made[self.weight].new_zeros(old.shape)
            made[self.weight] = whole.index_copy(int(not self.transposed), places, made[self.weight])
        return {node: (old + made[node].to(old)).detach() for node, old in olds.items() if isinstance(old, Tensor)}

    def _normed(self, norm: OutputNorm, change: Tensor, values: Values) -> dict[fx.Node, Tensor]:
        weight, gain, bias = (None if n is None else values[n] for n in (self.weight, norm.gain, self.bias))
        assert isinstance(weight, Tensor) and isinstance(gain, Tensor)
        rows = weight.T if self.transposed else weight
        if isinstance(bias, Tensor):
            rows = torch.cat([rows, bias[:, None]], 1)
        rows, new = norm.changed(rows, gain, change)
        made = rows[:, : self.fan_in]
        found = {self.weight: (made.T if self.transposed else made).to(weight), norm.gain: new.to(gain)}
        if self.bias is not None and isinstance(bias, Tensor):
            found[self.bias] = rows[:, self.fan_in].to(bias)
        return {node: value.detach() for node, value in found.items()}


def linear_maps(
    branch: Branch, weights: Mapping[fx.Node, str], constant: Container[fx.Node]
) -> dict[str, LinearMap | str]:
    """The maps by which ``branch`` writes to the stream, or why they cannot be fitted, by the name of each.

    A private sequence of a plan is one branch that adds a value for each of its members, by their names. Only the last
    one's map can be fitted: what another one adds is read by those after it.

    Args:
        branch: of a graph whose parameters are placeholders.
        weights: the names of these, by node.
        constant: the nodes that depend on weights alone.
    """
    made: dict[str, LinearMap | str] = {}
    for term in branch.terms:
        name = str(term.node.meta.get(STAMP, branch.name))
        others = {other.node for other in branch.terms if other is not term}
        if others & _descendants(term.node, branch.nodes):
            made[name] = "what it adds is read by others of its private sequence"
        elif name in made:
            made[name] = "it adds several values to the stream"
        else:
            made[name] = linear_map(name, term, weights, constant)
    return made


def _descendants(node: fx.Node, inside: Container[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        new = [user for user in stack.pop().users if user in inside and user not in found]
        found.update(new)
        stack.extend(new)
    return found


def linear_map(name: str, term: Term, weights: Mapping[fx.Node, str], constant: Container[fx.Node]) -> LinearMap | str:
    """The linear map that makes ``term``, called ``name``, or why it cannot be fitted; see :func:`linear_maps`."""
    node, scale = term.node, term.scale
    for taken in layers(node, PASSED | Change.ROUND | Change.NUMBER):
        node, scale = taken.source, scale * taken.scale
    last, norm = projection(node, constant), None
    if last is None and (behind := output_norm(node, weights, constant)) is not None:
        norm, normed, number = behind
        last, scale = projection(normed, constant), scale * Scale(number)
    if last is None:
        return "its output is not a linear map (a norm or a gain of the output, or a mixture of experts)"
    if last.rows is not None:
        return "its output is a part of a larger projection"
    weight, transposed, units = last.weight, last.transposed, None
    if (narrowed := kept_of(weight)) is not None:
        weight, units = narrowed
        if (turned := turned_of(weight)) is not None:
            weight, transposed = turned, not transposed
    for each in (weight, last.bias, None if norm is None else norm.gain):
        if each is None:
            continue
        if each not in weights:
            return "its weight is no parameter (a buffer), or computed from others (quantized, or an adapter)"
        if len(each.users) > 1:
            return f"{weights[each]} has other uses"
    return LinearMap(name, last.input, weight, last.bias, transposed, last.fan_in, scale, units, norm)
