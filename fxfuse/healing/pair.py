"""A model under a plan beside itself without: both run in stages, sum by sum, over the same batches.

At each residual sum of the planned model whose maps can be fitted, the stream of the original says what the planned
stream should be: the sum of everything that the plan has let in until there, and of what it has dropped on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxfuse._torch.dynamo import innermost, originals_forbidden
from fxfuse.backend.frontend import Captured, compiled_apart, take
from fxfuse.backend.naming import elsewhere
from fxfuse.data.batches import Batch, blaming, fresh, on_device_of
from fxfuse.errors import CaptureError, HealError, PlanError, nearest
from fxfuse.graph.constant import weight_only
from fxfuse.graph.rerun import Program
from fxfuse.graph.values import parameters
from fxfuse.graph.walk import Route, Stage, Walk
from fxfuse.healing.maps import LinearMap, linear_maps
from fxfuse.measure.divergence import rows
from fxfuse.measure.instrument import scaled
from fxfuse.model.force import uncompiled
from fxfuse.passes.pipeline import edit
from fxfuse.plan import Plan
from fxfuse.stream.branch import Term
from fxfuse.stream.finder import ResidualStream, find_streams


@dataclass(frozen=True)
class Step:
    """One residual sum of the planned model, and what its stream should be after it.

    Attributes:
        branches: names of those that are added there.
        maps: the linear maps by which they are, of those that can be fitted.
        refused: why others cannot, by branch.
        out: node of the planned stream after the sum.
        names: of the maps' parameters, by node.
        goal: node of the original's stream.
        absent: contributions in ``goal`` that the planned stream gets only later.
    """

    branches: tuple[str, ...]
    maps: tuple[LinearMap, ...]
    refused: Mapping[str, str]
    out: fx.Node
    names: Mapping[fx.Node, str]
    goal: fx.Node
    absent: tuple[Term, ...]


@dataclass(frozen=True)
class _Graphs:
    """What is the same for all batches that one graph serves."""

    steps: tuple[Step, ...]
    original: Route
    planned: Route


class Pair:
    """One batch on its way through both models."""

    def __init__(self, graphs: _Graphs, inputs: Sequence[object], counted: Tensor | None) -> None:
        self.steps = graphs.steps
        self._original, self._planned = Walk(graphs.original, inputs), Walk(graphs.planned, inputs)
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
        goal = self._original.values[self.step.goal]
        assert isinstance(goal, Tensor)
        for term in self.step.absent:
            goal = goal - scaled(term, self._original.values)
        return rows(goal, self._counted)

    def stream(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What it is with some ``weights`` of the step's maps replaced, ``[tokens, d]``."""
        out = self._planned.attempt(self._by_node(weights))[self.step.out]
        assert isinstance(out, Tensor)
        return rows(out, self._counted)

    def inputs(self) -> Tensor:
        """What the step's maps read, side by side: ``[tokens, columns]``."""
        each = [rows(map_.inputs(self._planned.values), self._counted) for map_ in self.step.maps]
        return torch.cat(each, -1)

    def changed(self, change: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The step's parameters after ``change`` ``[d, columns]``; ``weights`` are some of them as they are now."""
        values = {**self._planned.values, **self._by_node(weights)}
        changed: dict[str, Tensor] = {}
        for map_, part in zip(self.step.maps, torch.split(change, [m.columns for m in self.step.maps], 1), strict=True):
            changed |= {self.step.names[node]: new for node, new in map_.changed(part, values).items()}
        return changed

    def leave(self, weights: Mapping[str, Tensor]) -> None:
        """Go on with these weights."""
        self._original.leave({})
        self._planned.leave(self._by_node(weights))
        self._number += 1

    def _by_node(self, weights: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        """All parameters of the step's maps: new ones, or those that are there."""
        values = self._planned.values
        nodes = [node for map_ in self.step.maps for node in map_.parameters]
        held = {node: weights.get(self.step.names[node], values[node]) for node in nodes}
        return {node: value for node, value in held.items() if isinstance(value, Tensor)}


class _Enough(Exception):  # noqa: N818 - it is no error
    """Raised where a call of the model has given what was wanted of it."""


def pairs(model: nn.Module, plan: Plan, batches: Iterable[Batch]) -> list[Pair]:
    """Each batch at the start of both models. Nothing is computed yet; a pair keeps its inputs.

    Raises:
        PlanError: the plan does not fit the model, or parts of it have left the model already.
        CaptureError: the model cannot be traced to one graph, or not be run in parts.
        RecordError: the model cannot be called with a batch.
    """
    made: list[Pair] = []
    counted: Tensor | None = None

    def follow(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        captured = take(gm, inputs, model)
        graphs = _graphs(captured, plan, model)
        if graphs is None:
            return gm.forward

        def run(*inputs: object) -> object:
            made.append(Pair(graphs, inputs, counted))
            raise _Enough

        return run

    compiled = compiled_apart(model, follow, dynamic=None)
    for number, batch in enumerate(batches):
        mask = batch.get("attention_mask")
        counted = mask if isinstance(mask, Tensor) else None
        before = len(made)
        with blaming(number, batch), torch.no_grad(), uncompiled(model), originals_forbidden():
            try:
                compiled(**on_device_of(model, fresh(batch)))
            except Exception as error:
                if not isinstance(innermost(error), _Enough):
                    raise
        if len(made) == before:
            raise CaptureError("no residual stream was found in the model; fxfuse.explain says what was seen")
    if len({tuple(step.branches for step in pair.steps) for pair in made}) > 1:
        raise HealError("the model has other branches in some batches than in others: heal with one kind of call")
    return made


def _graphs(captured: Captured, plan: Plan, model: nn.Module) -> _Graphs | None:
    bare = captured.copy()
    for each, edits in ((bare, Plan()), (captured, plan)):
        edit(each.gm, edits, names=each.names, strict=True, elsewhere=elsewhere(model, each.names))
    streams = find_streams(bare.gm, bare.names)
    if not streams:
        return None
    known = {branch.name for stream in streams for branch in stream.branches}
    if absent := next((name for name in plan.names if name not in known), None):
        raise PlanError(
            f"{absent!r} is no branch of this model as it is{nearest(absent, known)}. If the plan was applied to it "
            "already, heal the original first, then apply the plan"
        )
    steps = _steps(captured, streams, plan)
    original, planned = Program(bare.gm), Program(captured.gm)
    seen = [{step.goal, *(n for term in step.absent for n in (term.node, *term.scale.nodes))} for step in steps]
    return _Graphs(
        steps,
        Route(original, [Stage(frozenset(nodes)) for nodes in seen]),
        Route(planned, [_stage(planned, step) for step in steps]),
    )


def _stage(program: Program, step: Step) -> Stage:
    inputs = {node for map_ in step.maps for node in (map_.input, *map_.scale.nodes)}
    weights = {node for map_ in step.maps for node in map_.parameters}
    again = program.plan(weights, {step.out})
    # What others read of what is decided is wanted too: a cast of the stream, or a tap.
    decided = {node for node in again.nodes if any(user not in again.nodes for user in node.users)}
    return Stage(frozenset({*inputs, step.out}), program.plan(weights, decided | {step.out}))


def _steps(planned: Captured, originals: Sequence[ResidualStream], plan: Plan) -> tuple[Step, ...]:
    """The sums at which the planned model can be led back to the original, in graph order."""
    gm, names = planned.gm, planned.names
    weights = parameters(gm, names)
    constant = weight_only(gm, weights)
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    places = {b.name: (stream, n) for stream in originals for n, each in enumerate(stream.sums) for b in each.branches}
    graph = originals[0].sums[0].out.graph
    before = {node: index for index, node in enumerate(graph.nodes)}
    edited = [before[stream.sums[n].out] for name, (stream, n) in places.items() if name in plan.names]
    steps: list[Step] = []
    for stream in find_streams(gm, names):
        inside: set[str] = set()
        for sum_ in stream.sums:
            found: dict[str, LinearMap | str] = {}
            for branch in sum_.branches:
                found |= linear_maps(branch, names, constant)
            if lost := next((name for name in found if name not in places), None):
                raise CaptureError(f"{lost!r} of the planned model is no branch of the original: it cannot be healed")
            inside |= found.keys()
            if not inside:
                continue
            source = places[next(iter(inside))][0]
            last = max(places[name][1] for name in inside)
            absent = [
                branch
                for earlier in source.sums[: last + 1]
                for branch in earlier.branches
                if branch.name not in inside and branch.name not in plan.drop
            ]
            maps = tuple(each for each in found.values() if isinstance(each, LinearMap))
            touched = bool(edited) and before[source.sums[last].out] >= min(edited)
            factors = len(source.points) > len(source.sums) + 1
            if not maps or not touched or (absent and factors):
                continue
            refused = {name: each for name, each in found.items() if isinstance(each, str)}
            terms = tuple(term for branch in absent for term in branch.terms)
            steps.append(Step(tuple(found), maps, refused, sum_.out, names, source.sums[last].out, terms))
    return tuple(sorted(steps, key=lambda step: order[step.out]))
