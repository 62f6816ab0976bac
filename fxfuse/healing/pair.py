"""A model under a plan beside itself without: both run in stages, sum by sum, over the same batches.

At each residual sum of the planned model whose maps can be fitted, the stream of the original says what the planned
stream should be: the sum of everything that the plan has let in until there, and of what it has dropped on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from fxfuse._torch.dynamo import innermost, originals_forbidden
from fxfuse.backend.frontend import Captured, compiled_apart, take
from fxfuse.backend.naming import elsewhere
from fxfuse.data.batches import Batch, blaming, fresh, on_device_of
from fxfuse.errors import CaptureError, HealError, PlanError, nearest
from fxfuse.graph.rerun import Program
from fxfuse.graph.walk import Route, Stage, Walk
from fxfuse.healing.behind_norms import steps_behind_norms
from fxfuse.healing.targets import Step, find_targets, linear_steps, map_steps, region_steps
from fxfuse.measure.divergence import rows
from fxfuse.measure.instrument import scaled
from fxfuse.model.force import uncompiled
from fxfuse.passes.pipeline import edit
from fxfuse.plan import Plan
from fxfuse.stream.finder import ResidualStream, find_streams

Stops: TypeAlias = Literal["sums", "regions", "linear"]
"""Where both models stop; see :func:`pairs`."""


@dataclass(frozen=True)
class _Graphs:
    """What is the same for all batches that one graph serves."""

    steps: tuple[Step, ...]
    original: Route
    planned: Route


class Pair:
    """One batch on its way through both models.

    Attributes:
        steps: where they stop.
        weight: how much a token counts. Errors are relative to the goal, so a weight of w is a goal that is shorter by
            the root of w, from which the same is missing.
    """

    def __init__(
        self, graphs: _Graphs, inputs: Sequence[object], healed: Sequence[object], counted: Tensor | None
    ) -> None:
        self.steps = graphs.steps
        self.weight = 1.0
        self._original, self._planned = Walk(graphs.original, inputs), Walk(graphs.planned, healed)
        self._counted = counted
        self._number = 0

    @property
    def step(self) -> Step:
        return self.steps[self._number]

    def reach(self) -> None:
        """Run both models up to the next step."""
        self._original.reach()
        self._planned.reach()

    def goal(self) -> Tensor:
        """What the stream should be after the step, ``[tokens, d]``."""
        return self._goal() if self.weight == 1 else self._short(self._goal())

    def _short(self, goal: Tensor) -> Tensor:
        return goal.to(torch.promote_types(goal.dtype, torch.float32)) / math.sqrt(self.weight)

    def _goal(self) -> Tensor:
        return rows(self._whole_goal(), self._counted)

    def _whole_goal(self) -> Tensor:
        """With the tokens that do not count, in the shape of the stream."""
        goal = self._original.values[self.step.goal]
        assert isinstance(goal, Tensor)
        for term in self.step.absent:
            goal = goal - scaled(term, self._original.values, goal)
        return goal

    def stream(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What it is with some of the step's ``weights`` replaced, ``[tokens, d]``."""
        out = self._planned.attempt(self._by_node(weights))[self.step.out]
        assert isinstance(out, Tensor)
        stream = rows(out, self._counted)
        if self.weight == 1:
            return stream
        goal = self._goal()
        short = self._short(goal)
        return short - (goal.to(short) - stream.to(short))

    def inputs(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What the step's maps read, side by side: ``[tokens, columns]``; ``weights`` are some of them as they are."""
        values = {**self._planned.values, **self._by_node(weights)}
        return torch.cat([rows(map_.inputs(values), self._counted) for map_ in self.step.maps], -1)

    def changed(self, change: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The step's parameters after ``change`` ``[d, columns]``; ``weights`` are some of them as they are now."""
        values = {**self._planned.values, **self._by_node(weights)}
        changed: dict[str, Tensor] = {}
        for map_, part in zip(self.step.maps, torch.split(change, [m.columns for m in self.step.maps], 1), strict=True):
            changed |= {self.step.weights[node]: new for node, new in map_.changed(part, values).items()}
        return changed

    def leave(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with these weights."""
        self._leave(weights, {})

    def return_to_goal(self) -> None:
        """Go on with the stream as it should be, as if nothing had been changed until here."""
        self._leave({}, {self.step.out: self._whole_goal()})

    def _leave(self, weights: Mapping[str, Tensor], instead: Mapping[fx.Node, Tensor]) -> None:
        self._original.leave({})
        self._planned.leave(self._by_node(weights), instead)
        self._number += 1

    def weights(self) -> dict[str, Tensor]:
        """The step's parameters as they are, by name."""
        values = self._planned.values
        return {name: value for node, name in self.step.weights.items() if isinstance(value := values[node], Tensor)}

    def _by_node(self, weights: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        return {node: weights[name] for node, name in self.step.weights.items() if name in weights}


class _Enough(Exception):  # noqa: N818 - it is no error
    """Raised where a call of the model has given what was wanted of it."""


def pairs(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    weights: Mapping[str, Tensor] | None = None,
    at: Stops = "sums",
    planned: nn.Module | None = None,
) -> list[Pair]:
    """Each batch at the start of both models. Nothing is computed yet; a pair keeps its inputs.

    Args:
        model: the original.
        plan: what the planned model follows.
        batches: what both are called with.
        weights: that the planned model has in place of its own, by name.
        at: where they stop: at all sums with maps that can be fitted; at the ends of "regions", where a step is all
            that changes the stream up to an FFN, with all its parameters; or at the attentions made "linear" alone.
        planned: what runs under the plan; None for the original itself.

    Raises:
        PlanError: the plan does not fit the model, or parts of it have left the model already.
        CaptureError: the model cannot be traced to one graph, or not be run in parts.
        RecordError: the model cannot be called with a batch.
    """
    student = planned or model
    originals = _calls(model, batches)
    others = originals if student is model else _calls(student, batches)
    known: dict[tuple[int, int], _Graphs] = {}
    made: list[Pair] = []
    for batch, one, other in zip(batches, originals, others, strict=True):
        key = id(one.traced), id(other.traced)
        if key not in known:
            known[key] = _graphs(one.traced, other.traced.captured, plan, student, at)
        own = other.traced.captured.names
        names = [own.get(node, "") for node in other.traced.captured.gm.graph.find_nodes(op="placeholder")]
        healed = [(weights or {}).get(name, value) for name, value in zip(names, other.inputs, strict=True)]
        mask = batch.get("attention_mask")
        made.append(Pair(known[key], one.inputs, healed, mask if isinstance(mask, Tensor) else None))
    if len({tuple(step.branches for step in pair.steps) for pair in made}) > 1:
        raise HealError("the model has other branches in some batches than in others: heal with one kind of call")
    return made


@dataclass(frozen=True)
class _Traced:
    """A graph that has residual streams, as it was traced, and again in canonical form with its streams."""

    captured: Captured
    bare: Captured
    streams: tuple[ResidualStream, ...]


@dataclass(frozen=True)
class _Call:
    """One call of a model: its graph, and the values of the graph's inputs."""

    traced: _Traced
    inputs: Sequence[object]


def _calls(model: nn.Module, batches: Sequence[Batch]) -> list[_Call]:
    """What a call of ``model`` with each of the batches would run; it is stopped there."""
    made: list[_Call] = []

    def follow(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        captured = take(gm, inputs, model)
        bare = captured.copy()
        edit(bare.gm, Plan(), names=bare.names, strict=True, elsewhere=elsewhere(model, bare.names, Plan()))
        streams = find_streams(bare.gm, bare.names)
        if not streams:
            return gm.forward
        traced = _Traced(captured, bare, streams)

        def run(*inputs: object) -> object:
            made.append(_Call(traced, inputs))
            raise _Enough

        return run

    compiled = compiled_apart(model, follow, dynamic=None)
    for number, batch in enumerate(batches):
        before = len(made)
        with blaming(number, batch), torch.no_grad(), uncompiled(model), originals_forbidden():
            try:
                compiled(**on_device_of(model, fresh(batch)))
            except Exception as error:
                if not isinstance(innermost(error), _Enough):
                    raise
        if len(made) == before:
            raise CaptureError("no residual stream was found in the model; fxfuse.explain says what was seen")
    return made


def _graphs(original: _Traced, captured: Captured, plan: Plan, student: nn.Module, at: Stops) -> _Graphs:
    planned = captured.copy()
    edit(planned.gm, plan, names=planned.names, strict=True, elsewhere=elsewhere(student, planned.names, plan))
    known = {branch.name for stream in original.streams for branch in stream.branches}
    if absent := next((name for name in plan.names if name not in known), None):
        raise PlanError(
            f"{absent!r} is no branch of this model as it is{nearest(absent, known)}. If the plan was applied to it "
            "already, heal the original first, then apply the plan"
        )
    targets = find_targets(planned, original.streams, plan)
    if at == "regions":
        steps = region_steps(planned, targets)
    elif at == "linear":
        steps = _in_order(planned, linear_steps(planned, targets, plan), original, plan)
    else:
        steps = _in_order(planned, map_steps(planned, targets, plan), original, plan)
    first, second = Program(original.bare.gm), Program(planned.gm)
    seen = [{step.goal, *(n for term in step.absent for n in (term.node, *term.scale.nodes))} for step in steps]
    return _Graphs(
        steps,
        Route(first, [Stage(frozenset(nodes)) for nodes in seen]),
        Route(second, [_stage(second, step) for step in steps]),
    )


def _in_order(planned: Captured, steps: Sequence[Step], original: _Traced, plan: Plan) -> tuple[Step, ...]:
    """These and the steps behind norms, as the graph has them."""
    order = {node: index for index, node in enumerate(planned.gm.graph.nodes)}
    inner = steps_behind_norms(planned, original.bare, original.streams, plan)
    return tuple(sorted((*inner, *steps), key=lambda step: order[step.out]))


def _stage(program: Program, step: Step) -> Stage:
    inputs = {node for map_ in step.maps for node in (map_.input, *map_.scale.nodes)}
    weights = set(step.weights)
    again = program.plan(weights, {step.out})
    # What others read of what is decided is wanted too: a cast of the stream, or a tap.
    decided = {node for node in again.nodes if any(user not in again.nodes for user in node.users)}
    return Stage(frozenset({*inputs, step.out}), program.plan(weights, decided | {step.out}))
