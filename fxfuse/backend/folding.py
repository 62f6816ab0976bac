"""Fold gains: what the norms of a plan's groups multiply with goes into the weights that read them, in the model.

``W norm(h)`` with a gain g is ``(W diag(g)) (norm(h) / g)``. A compiler does that to plain weights by itself, in packed
copies. Into quantized numbers no gain of a feature can go, so it has to be done before they are quantized: afterwards
the FFNs of a group read one value, and their quantized gate and up are one. They share one gain from then on, of ones.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxfuse.backend.frontend import Captured, capture
from fxfuse.errors import PlanError, nearest
from fxfuse.ffn.affine import unfoldable
from fxfuse.ffn.anatomy import GateUp
from fxfuse.ffn.projection import projection
from fxfuse.graph.constant import weight_only
from fxfuse.graph.ops import op
from fxfuse.graph.peel import PASSED, Change, layer, peel
from fxfuse.passes.simplify import simplify
from fxfuse.plan import Plan, flat
from fxfuse.stream.branch import Branch
from fxfuse.stream.finder import find_streams


@dataclass(frozen=True)
class _Fold:
    """What is done to one FFN: the names of its gain and of its weights, and what makes a gain of ones."""

    branch: str
    gain: str
    neutral: float
    weights: tuple[tuple[str, bool], ...]  # with whether it is [in, out]


@torch.no_grad()
def fold_gains(model: nn.Module, plan: Plan, *args: object, **kwargs: object) -> tuple[str, ...]:
    """Put the gains of the norms of ``plan``'s groups of FFNs into their gate and up, in place, before quantizing.

    The model computes what it did, with the plan or without it. The norms of a group share one parameter afterwards.

    Args:
        model: a model whose weights are not quantized yet. It is called once, without gradients.
        plan: the plan that it is to follow; members that are no FFNs are left alone.
        args: of the call, as ``kwargs`` are.
        kwargs: of the call.

    Returns:
        the FFNs whose gains were folded.

    Raises:
        PlanError: a gain of the groups cannot be folded exactly; the message names the FFN. The model is as it was.
        CaptureError: the model cannot be called or traced.
    """
    graphs = capture(model, *args, **kwargs)
    if len(graphs) > 1:
        raise PlanError(
            "gains are folded in models that are one graph; TORCH_LOGS=graph_breaks shows what cuts this one"
        )
    graph = _read(graphs[0])
    for name in (name for group in plan.parallel for name in flat(group)):
        if name not in graph.branches:
            raise PlanError(f"{name!r} is no branch of this model{nearest(name, graph.branches)}")
    groups = [_folds(graph, [graph.branches[name] for name in flat(group)]) for group in plan.parallel]
    done: list[str] = []
    for folds in groups:
        for fold in folds:
            _multiply(model, fold)
        for fold in folds:  # when all have it: some may share one already
            model.get_parameter(fold.gain).fill_(fold.neutral)
            _tie(model, folds[0].gain, fold.gain)
            done.append(fold.branch)
    return tuple(done)


@dataclass(frozen=True)
class _Graph:
    """The branches of a model by name, the names of its weights, and what depends on weights alone."""

    branches: Mapping[str, Branch]
    names: Mapping[fx.Node, str]
    constant: Container[fx.Node]


def _read(captured: Captured) -> _Graph:
    simplify(captured.gm)
    streams = find_streams(captured.gm, captured.names)
    branches = {branch.name: branch for stream in streams for branch in stream.branches}
    return _Graph(branches, captured.names, weight_only(captured.gm, captured.names))


def _folds(graph: _Graph, members: Sequence[Branch]) -> list[_Fold]:
    """What is to be done to the FFNs of a group; nothing, if it has only one."""
    halves = [(branch, branch.gate_up) for branch in members if branch.gate_up is not None]
    steps = {step for _, half in halves for step in half.normed.steps}
    found = [_fold(graph, branch, half, steps) for branch, half in halves] if len(halves) > 1 else []
    for (branch, _), fold in zip(halves, found, strict=False):
        if isinstance(fold, str):
            raise PlanError(f"the gain of {branch.name!r} cannot be folded: {fold}. Leave it out of the plan's groups")
    return [fold for fold in found if isinstance(fold, _Fold)]


def _fold(graph: _Graph, branch: Branch, half: GateUp, steps: Container[fx.Node]) -> _Fold | str:
    """What is to be done to one FFN, or why it cannot be; ``steps`` are those of the norms of its group."""
    normed = half.normed
    if half.blocks is not None or half.unpackable:
        return half.unpackable or "its weights are quantized already, and gains go into weights that are not"
    if normed.shifts or normed.factor.divisors or normed.factor.number != 1.0 or len(normed.factor.gains) != 1:
        return "its norm does not end with one gain and nothing else"
    if rounding := unfoldable(normed):
        return rounding
    gain, neutral = _parameter(normed.factor.gains[0])
    weights = {projection.weight: projection.transposed for projection in half.projections}
    if any(node not in graph.names for node in (gain, *weights)):
        return "its gain or its weights are no parameters of the model, but computed from others"
    ends = {user for weight in weights for user in _users(weight, graph.constant)}
    for end in ends:
        found = projection(end, graph.constant)
        if found is None or found.weight not in weights or found.input is not half.projections[0].input:
            return f"its weights also serve another value ({end.name})"
    if other := next((user for user in _users(gain, graph.constant) if user not in steps), None):
        return f"its norm's gain also serves another value ({other.name})"
    if other := _reader(normed.steps, ends):
        return f"another value is computed from what its norm makes ({other.name})"
    return _Fold(
        branch.name, graph.names[gain], neutral, tuple((graph.names[node], turned) for node, turned in weights.items())
    )


def _parameter(gain: fx.Node) -> tuple[fx.Node, float]:
    """The parameter that a gain is, or is one more than; and what it must hold for the gain to be one."""
    gain = peel(gain, Change.WIDEN | Change.COPY)
    call = op(gain)
    if call is not None and call.name == "add" and call.args.get("alpha", 1) == 1:
        for one, other in (("input", "other"), ("other", "input")):
            source = call.node(one)
            if source is not None and call.args.get(other) == 1:
                return peel(source, Change.WIDEN | Change.COPY), 0.0
    return gain, 1.0


def _users(weight: fx.Node, constant: Container[fx.Node]) -> set[fx.Node]:
    """The nodes that read a weight, or what is made of weights alone, together with other values."""
    users: set[fx.Node] = set()
    stack = [weight]
    while stack:
        for user in stack.pop().users:
            if user in constant:
                stack.append(user)
            else:
                users.add(user)
    return users


def _reader(steps: Sequence[fx.Node], ends: Container[fx.Node]) -> fx.Node | None:
    """Who reads what a norm makes beside the projections ``ends``, if anybody does."""
    stack = list(steps)
    while stack:
        for user in stack.pop().users:
            if user in ends or user in steps:
                continue
            if layer(user, PASSED) is None:
                return user
            stack.append(user)
    return None


def _multiply(model: nn.Module, fold: _Fold) -> None:
    """Multiply the weights with the gain, rounded once."""
    gain = model.get_parameter(fold.gain)
    by = (gain.double() + (1.0 - fold.neutral)).flatten()
    for name, turned in fold.weights:
        weight = model.get_parameter(name)
        weight.copy_(weight.double() * (by[:, None] if turned else by))


def _tie(model: nn.Module, first: str, other: str) -> None:
    """Let the gain ``other`` be the parameter ``first``, where they are alike."""
    one, two = model.get_parameter(first), model.get_parameter(other)
    if (one.shape, one.dtype, one.device) == (two.shape, two.dtype, two.device):
        path, _, own = other.rpartition(".")
        setattr(model.get_submodule(path), own, one)
