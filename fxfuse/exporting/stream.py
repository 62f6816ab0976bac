"""The stream that is exported: one graph of the model, its one residual stream, and where the plan has its branches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from fxfuse.backend.frontend import capture
from fxfuse.backend.naming import elsewhere
from fxfuse.errors import ExportError
from fxfuse.exporting.points import planned_points
from fxfuse.graph.constant import weight_only
from fxfuse.graph.values import parameters
from fxfuse.passes.pipeline import edit
from fxfuse.passes.select import settle
from fxfuse.plan import Member, Plan
from fxfuse.stream.branch import Branch
from fxfuse.stream.finder import ResidualStream, find_streams


@dataclass(frozen=True)
class Planned:
    """A captured model and its plan.

    Attributes:
        plan: what is to become of it.
        gm: its graph in canonical form, with none of the plan's edits made.
        edited: the same with all of them.
        inputs: the values of its placeholders.
        names: the dotted names of its weights, by placeholder.
        stream: its residual stream.
        weights: the nodes that depend on weights alone.
        points: who is added at each sum of the planned stream.
    """

    plan: Plan
    gm: fx.GraphModule
    edited: fx.GraphModule
    inputs: tuple[Tensor, ...]
    names: Mapping[fx.Node, str]
    stream: ResidualStream
    weights: set[fx.Node]
    points: tuple[tuple[Member, ...], ...]

    @property
    def branches(self) -> dict[str, Branch]:
        return {branch.name: branch for branch in self.stream.branches}


def planned_stream(model: nn.Module, plan: Plan, example: Mapping[str, object]) -> Planned:
    """Trace the model and find the stream that ``plan`` edits.

    Args:
        model: the original, healed or not, or one that was pruned already.
        plan: what is to become of it.
        example: the arguments of one call, which is to fill no cache.

    Raises:
        ExportError: the model is not one graph with one residual stream.
        PlanError: the plan does not fit it.
        CaptureError: it cannot be traced.
    """
    graphs = capture(model, **example)
    if len(graphs) > 1:
        raise ExportError(
            f"the model is traced in {len(graphs)} graphs, and a checkpoint is written of a model that is one: "
            "TORCH_LOGS=graph_breaks shows what breaks it"
        )
    (captured,) = graphs
    trial, own = captured.copy(), captured.copy()
    gone = elsewhere(model, trial.names, plan)
    edit(trial.gm, plan, names=trial.names, strict=True, elsewhere=gone)  # says if it does not fit
    edit(own.gm, Plan(), names=own.names)
    streams = find_streams(own.gm, own.names)
    settle(plan.names, streams)
    if len(streams) != 1:
        raise ExportError(f"the model has {len(streams)} residual streams, and this format says how one is computed")
    stream = streams[0]
    points = planned_points([[branch.name for branch in each.branches] for each in stream.sums], plan)
    constant = weight_only(own.gm, parameters(own.gm, own.names))
    return Planned(plan, own.gm, trial.gm, own.inputs, own.names, stream, constant, tuple(points))
