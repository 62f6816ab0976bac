"""The one order in which the passes run.

1. ``simplify``: so that every later pass sees one dialect, and sums and norms without disguises.
2. the branches get their names, once: a name means what it meant before any edit.
3. ``drop``, ``linear``, ``narrow``, then ``parallelize``: the plan, the only approximation.
4. ``fuse_ffn``: what stands in parallel becomes wide; if asked for, fxfuse's kernels also compute what stands alone.
5. ``merge_gate_up``: what could not shares its gate/up, and what stands alone has one of its own if asked for.
6. what several processes add up is added up once for each sum.
7. what fxfuse's own kernels compute adds itself to the stream, where it can.

All or nothing: if a pass raises, the graph is as it was.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from torch import fx, nn

from fxfuse._common.units import Narrowed
from fxfuse.errors import PlanError, nearest
from fxfuse.graph.values import clean, name_weights, names_in
from fxfuse.packing.strategy import BY_OPTION, Weights
from fxfuse.passes.add_in_kernel import AddInKernel
from fxfuse.passes.base import Pass, PassReport
from fxfuse.passes.drop import Drop
from fxfuse.passes.emit.kernel import Kernels
from fxfuse.passes.fuse_ffn import FuseFFN
from fxfuse.passes.join_reductions import JoinReductions
from fxfuse.passes.linear import Linear, OwnMap
from fxfuse.passes.merge_gate_up import MergeGateUp
from fxfuse.passes.narrow import Narrow
from fxfuse.passes.parallelize import Parallelize
from fxfuse.passes.runner import Runner, running
from fxfuse.passes.select import branch_names, settle
from fxfuse.passes.simplify import Simplify
from fxfuse.plan import Group, Plan, flat
from fxfuse.stream.branch import stamp
from fxfuse.stream.finder import ResidualStream

log = logging.getLogger(__name__)

REPORTS = "fxfuse_reports"
"""Key of ``gm.meta`` under which :func:`apply_plan` leaves the tuple of its passes' reports."""

FOUND = "fxfuse_found"
"""Key of ``gm.meta`` under which it leaves, as text, which branches it found and what each of them is."""


Cut: TypeAlias = Literal["", "break", "ddp"]

CUT = "fxfuse_cut"
"""Key of ``gm.meta`` under which whoever has a graph of Dynamo's leaves what cut it from the rest of the model."""

_DDP = (
    "torch._dynamo.config.optimize_ddp = False keeps the graph whole, a larger bucket_cap_mb of DDP cuts it less often"
)
_CUTS = {
    "break": (
        "a graph break",
        "TORCH_LOGS=graph_breaks shows where",
        "the break (TORCH_LOGS=graph_breaks shows where it is); after a call that raised while it was traced, "
        "torch._dynamo.reset() has the model traced whole again",
    ),
    "ddp": ("the border of two of DDP's gradient buckets", _DDP, f"the border: {_DDP}"),
}
"""Of each kind of cut: what it is called, what one can do about it, and the same with what is to be removed."""


def apply_plan(
    gm: fx.GraphModule,
    plan: Plan,
    *,
    names: Mapping[fx.Node, str] | None = None,
    strict: bool = False,
    weights: Weights = "copy",
    merge_gate_up: bool = False,
    kernels: Kernels = "auto",
    elsewhere: Callable[[str], bool] = lambda name: False,
    root: nn.Module | None = None,
    inputs: Sequence[object] | None = None,
    verify: bool = False,
    max_rewrites: int | None = None,
    dump: Path | None = None,
    then: Sequence[Pass] = (),
    seen: Callable[[Sequence[ResidualStream]], None] = lambda streams: None,
) -> fx.GraphModule:
    """Apply ``plan`` to a graph, whoever traced it, in place, and fuse what it made parallel.

    Args:
        gm: a graph of Dynamo, torch.export, symbolic_trace or make_fx. It is linted and recompiled, and
            ``gm.meta["fxfuse_reports"]`` says what each pass did.
        plan: what to change; an empty plan changes nothing that is computed.
        names: the dotted names of weights, by node, where the caller knows better than the graph.
        strict: a dropped name that no branch has is an error, not a warning.
        weights: see :func:`fxfuse.passes.fuse_ffn`.
        kernels: see :func:`fxfuse.passes.fuse_ffn`.
        merge_gate_up: also do something for FFNs that are fused with no other: one call of fxfuse's kernels, where
            those run and pay, else one GEMM for gate and up (:func:`fxfuse.passes.merge_gate_up`).
        elsewhere: tells whether a name that is not in this graph belongs to another part of the model (graph breaks)
            or has left it already (pruned), so that it is no mistake.
        root: the module that was traced: its parameters have their names in it, whatever the graph calls them (make_fx
            says ``_param_constant0``).
        inputs: example inputs of the graph, for the sizes that symbolic_trace does not record, and for ``verify``.
        verify: compare all that is fused with what it replaces, in float64 on ``inputs``.
        max_rewrites: how many fusions to make at most, to find by bisection one that is not what it should be.
        dump: a folder that gets the graph as it is, and after each pass that changed it.
        then: passes to run last.
        seen: is given the streams as they are before any edit.

    Returns:
        ``gm`` itself.

    Raises:
        PlanError: the plan does not fit the graph; the message names the entry.
        VerifyError: something that was fused is not what it replaces; the message names the branches.
        OptionError, CaptureError: ``inputs`` are needed and not there, or are none of the graph's.
    """
    with running(gm, inputs=inputs, verify=verify, max_rewrites=max_rewrites, dump=dump) as runner:
        if root is not None:
            names = {**names_in(root, gm, inputs), **(names or {})}
        _edit(runner, plan, names, strict, elsewhere, inputs, seen)
        wide = runner(FuseFFN(BY_OPTION[weights], kernels, merge_gate_up))
        if merge_gate_up or wide.refused:  # else none is left that stands in parallel
            runner(MergeGateUp(BY_OPTION[weights], merge_gate_up))
        else:
            runner.reports.append(PassReport(MergeGateUp.name))
        runner(JoinReductions())
        runner(AddInKernel())
        for pass_ in then:
            runner(pass_)
    gm.meta[REPORTS] = tuple(runner.reports)
    return gm


def edit(
    gm: fx.GraphModule,
    plan: Plan,
    *,
    names: Mapping[fx.Node, str] | None = None,
    strict: bool = False,
    elsewhere: Callable[[str], bool] = lambda name: False,
    inputs: Sequence[object] | None = None,
    maps: Mapping[str, OwnMap] | None = None,
) -> list[PassReport]:
    """What :func:`apply_plan` does but for the fusing: the planned graph, its branches each by itself, writes tied.

    ``maps`` are for attentions that the plan makes linear: see :func:`fxfuse.passes.linear.linear`.
    """
    with running(gm, tied=True) as runner:
        _edit(runner, plan, names, strict, elsewhere, inputs, maps=maps)
    return runner.reports


def _edit(
    runner: Runner,
    plan: Plan,
    names: Mapping[fx.Node, str] | None,
    strict: bool,
    elsewhere: Callable[[str], bool],
    inputs: Sequence[object] | None,
    seen: Callable[[Sequence[ResidualStream]], None] = lambda streams: None,
    maps: Mapping[str, OwnMap] | None = None,
) -> None:
    name_weights(names or {})
    runner(Simplify(inputs))
    gm, streams = runner.gm, runner.name(names).streams
    settle(plan.names, streams)
    gm.meta[FOUND] = _found(streams)
    log.debug("%s", gm.meta[FOUND])
    seen(streams)
    for stream in streams:
        stamp(stream.branches)
    known = branch_names(streams)
    cut: Cut = gm.meta.get(CUT, "")
    _severed(plan, known, {clean(name) for name in (names or {}).values()}, elsewhere, cut)
    groups = _groups(plan, known, elsewhere, cut)
    if known or strict:
        _missing(plan, known, strict, elsewhere)
    runner(Drop(frozenset(name for name in plan.drop if name in known)))
    runner(Linear(frozenset(name for name in plan.linear if name in known), maps or {}))
    runner(Narrow(Narrowed({name: units for name, units in plan.narrow.items() if name in known})))
    runner(Parallelize(tuple(groups)))


def _found(streams: Sequence[ResidualStream]) -> str:
    """The branches of each stream, one a line, with their kinds and why they can be no part of a wide FFN."""
    lines = [f"found: {len(streams)} residual stream(s)"]
    for number, stream in enumerate(streams):
        lines.append(f"  stream {number}: {len(stream.sums)} residual sums")
        lines += [f"    {b.name}: {b.kind}" + f"; {b.reason}" * (b.reason not in ("", b.kind)) for b in stream.branches]
    return "\n".join(lines)


def _severed(
    plan: Plan, known: Collection[str], weights: Collection[str], elsewhere: Callable[[str], bool], cut: Cut
) -> None:
    """Raise for what is named and is no branch, though its weights are here."""
    for name in plan.names:
        if name in known or elsewhere(name) or not any(weight.startswith(f"{name}.") for weight in weights):
            continue
        raise PlanError(f"{name!r} is no branch of this graph, {_instead(name, known, cut)}{nearest(name, known)}")


def _instead(name: str, known: Collection[str], cut: Cut) -> str:
    """What the module ``name`` is, if it is no branch."""
    whole = [branch for branch in known if name.startswith(f"{branch}.")]
    inside = sorted(branch for branch in known if branch.startswith(f"{name}."))
    if whole:
        return f"but a part of the branch {whole[0]!r}: name that"
    if len(inside) > 1 or (inside and not cut):
        return f"but a module that holds {', '.join(map(repr, inside))}: name what is meant of them"
    if cut:
        return f"which holds weights of it. If its name is right, {_CUTS[cut][0]} inside it separates it from the " \
               f"stream ({_CUTS[cut][1]})"  # fmt: skip
    return (
        "though its weights are here: what they compute is not added to a stream by itself, or other branches share "
        "them, and then it is called @ and its number. fxfuse.explain shows the branches"
    )


def _groups(plan: Plan, known: Collection[str], elsewhere: Callable[[str], bool], cut: Cut) -> list[Group]:
    """The groups of the plan that this graph holds; one of which it holds a part is an error."""
    held: list[Group] = []
    for index, group in enumerate(plan.parallel):
        absent = [name for name in flat(group) if name not in known]
        if not absent:
            held.append(group)
            continue
        if len(absent) == len(flat(group)):
            continue
        unknown = next((name for name in absent if not elsewhere(name)), None)
        if unknown is not None:
            raise PlanError(f"parallel[{index}]: {unknown!r} is no branch of this graph{nearest(unknown, known)}")
        if not cut:
            raise PlanError(
                f"parallel[{index}]: {absent[0]!r} takes no part in this call of the model, which runs "
                f"{_other(group, absent)!r}: it was dropped before, or is not called. Leave it out of the group"
            )
        raise PlanError(
            f"parallel[{index}]: {_CUTS[cut][0]} separates {absent[0]!r} from {_other(group, absent)!r}: this graph "
            f"holds only one of them. Remove the member, or {_CUTS[cut][2]}"
        )
    return held


def _other(group: Group, absent: Collection[str]) -> str:
    return next(name for name in flat(group) if name not in absent)


def _missing(plan: Plan, known: Collection[str], strict: bool, elsewhere: Callable[[str], bool]) -> None:
    """Say, once, which names of the plan no branch has."""
    absent = [name for name in plan.names if name not in known and not elsewhere(name)]
    if not absent:
        return
    text = "; ".join(f"{name!r} is no branch of this graph{nearest(name, known)}" for name in absent[:5])
    text += f"; and {len(absent) - 5} more" if len(absent) > 5 else ""
    if strict:
        raise PlanError(text)
    warnings.warn(f"fxfuse: the plan names what is not there: {text}", stacklevel=3)
