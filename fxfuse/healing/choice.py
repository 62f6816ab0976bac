"""Which parameters are trained: found by the branches of the stream, never by what a model calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from torch import nn

from fxfuse.backend.frontend import Captured, capture
from fxfuse.backend.naming import elsewhere
from fxfuse.errors import HealError, PlanError, nearest
from fxfuse.passes.pipeline import edit
from fxfuse.passes.select import settle
from fxfuse.passes.simplify import simplify
from fxfuse.plan import Plan, flat
from fxfuse.stream.branch import Branch
from fxfuse.stream.finder import find_streams

Train: TypeAlias = Literal["edited", "ffn", "all", "lora"]

_FFN = ("gated_ffn", "ffn", "moe")


def choose(model: nn.Module, plan: Plan, batch: Mapping[str, object], train: Train) -> tuple[str, ...]:
    """The names of the parameters to train, in the model's order.

    Args:
        model: the original; it is called once.
        plan: what it will follow.
        batch: the arguments of the call.
        train: "edited": of the members of groups, of attentions made linear, of narrowed FFNs, and of the branches next
            to a dropped one, before it and after it; "ffn": of all FFNs; "all": of everything that the planned model
            uses; "lora": the matrices of all branches, to which adapters are then added. What is dropped is never among
            them.

    Raises:
        PlanError: the plan does not fit the model.
        CaptureError: the model cannot be called or traced.
        HealError: nothing of the kind is there.
    """
    graphs = capture(model, **batch)
    names: set[str] = set()
    known: set[str] = set()
    for captured in graphs:
        streams = _streams(captured, plan)
        known |= {branch.name for stream in streams for branch in stream}
        used = _used(captured.copy(), plan, model, strict=len(graphs) == 1)
        if train != "all":
            branches = [branch for stream in streams for branch in _chosen(stream, plan, train)]
            used &= {captured.names[node] for b in branches for node in b.parameters if node in captured.names}
        names |= used
    for name in plan.names:
        if name not in known:
            raise PlanError(f"{name!r} is no branch of this model{nearest(name, known)}")
    least = 2 if train == "lora" else 0
    by_id = {id(each): name for name, each in model.named_parameters(remove_duplicate=False) if name in names}
    made = tuple(
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in by_id and parameter.is_floating_point() and parameter.dim() >= least
    )
    if not made:
        raise HealError(f"train={train!r}: the planned model uses no parameter of that kind; train='all' has the most")
    return made


def _streams(captured: Captured, plan: Plan) -> list[Sequence[Branch]]:
    """The branches of each stream, in its order."""
    simplify(captured.gm)
    streams = find_streams(captured.gm, captured.names)
    settle(plan.names, streams)
    return [stream.branches for stream in streams]


def _used(captured: Captured, plan: Plan, model: nn.Module, strict: bool) -> set[str]:
    """The names of the weights that the graph uses under ``plan``."""
    names = captured.names
    edit(captured.gm, plan, names=names, strict=strict, elsewhere=elsewhere(model, names, plan))
    return {name for node, name in names.items() if node.users}


def _chosen(branches: Sequence[Branch], plan: Plan, train: Train) -> list[Branch]:
    kept = [branch for branch in branches if branch.name not in plan.drop]
    if train == "lora":
        return kept
    if train == "ffn":
        return [branch for branch in kept if branch.kind in _FFN]
    chosen = {name for group in plan.parallel for name in flat(group)} | {*plan.linear, *plan.narrow}
    for index, branch in enumerate(branches):
        if branch.name in plan.drop or branch.name in plan.linear:
            before, after = branches[:index][::-1], branches[index + 1 :]
            for side in (before, after):
                chosen |= {next((other.name for other in side if other.name not in plan.drop), "")}
    return [branch for branch in kept if branch.name in chosen]
