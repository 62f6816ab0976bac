"""The time of every branch of a model: in the model, as a linear map, and in groups that are one wide FFN.

What a branch takes in the model is what a call takes less without every second one of its kind.

Branches of equal shapes are compiled and measured once by themselves, as a part of the model's own graph
(:mod:`fxfuse.bench.parts`), and called with the weights of all of them in turn: no cache holds those, as none does when
the model itself runs. That tells what a linear map takes, and what a group does beside its members.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import ConfigDict
from torch import Tensor, fx, nn

from fxfuse._common.bounds import check_count
from fxfuse._common.progress import bar
from fxfuse._torch.apart import APART, twin
from fxfuse._torch.compiled import original
from fxfuse.backend.compiler import ffnfuse
from fxfuse.backend.frontend import Captured, capture
from fxfuse.bench.parts import Cutter, Part
from fxfuse.bench.prefill_decode import SAMPLE, Program, decode_step, filled_cache
from fxfuse.bench.timing import Samples, clock_of, interleave
from fxfuse.data.batches import cache_keyword, eval_mode
from fxfuse.errors import CaptureError, OptionError, PruneError
from fxfuse.model.pruning import prune
from fxfuse.plan import Plan
from fxfuse.stream.branch import Branch

Phase: TypeAlias = Literal["decode", "prefill"]

WHOLE, AGAIN = "the whole model", "again"

_DROPPED = ("attention", "gated_ffn", "ffn", "moe")

PACKED_BYTES = 2**29
"""Groups of one size share no weights, and are called in turn until their packed weights take so much."""


@dataclass(frozen=True)
class BranchTime:
    """One branch in one call of the model; seconds are those of all branches of its shapes, on the average.

    Attributes:
        name: of the branch.
        seconds: that the call takes less without it.
        linear: that one linear map takes in its place; None of what is no attention, or has no map that fits.
        groups: that 1, 2, 3, ... branches of its shapes take as one group, whose FFNs are one wide FFN, by itself;
            empty of all else.
        parameters: bytes of its weights.
        linear_parameters: of the weights that a linear map keeps.
        cache: bytes of the KV cache that it keeps in this call.
        width: hidden units of an FFN that can be narrowed; 0 of all else.
        unit_parameters: bytes of the weights of one of them.
        reduction: seconds, of ``seconds``, of the all-reduce of what it adds, in a model that several GPUs share.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    seconds: float
    linear: float | None
    groups: tuple[float, ...]
    parameters: int
    linear_parameters: int
    cache: int
    width: int = 0
    unit_parameters: int = 0
    reduction: float = 0.0


@dataclass(frozen=True)
class BranchTimes:
    """What :func:`time_branches` measured.

    Attributes:
        whole: seconds of a call of the model, compiled by ffnfuse without a plan, as all that is timed here is.
        branches: in stream order.
        apart: relative difference of two separately compiled copies of one part, which took turns.
        samples: all of it, by what was timed.
    """

    whole: float
    branches: tuple[BranchTime, ...]
    apart: float
    samples: Samples


def time_branches(
    model: nn.Module,
    ids: Tensor,
    phase: Phase = "decode",
    *,
    max_group: int = 4,
    inner: str = "inductor",
    repeats: int = 15,
    progress: bool = False,
) -> BranchTimes:
    """Time the branches of ``model`` in one call, whose programs take turns.

    Args:
        model: a language model, called as Hugging Face models are; compiled or not.
        ids: tokens ``[batch, context]``: the prompt (prefill), or what the KV cache holds (decode).
        phase: "decode" is the call of one more token.
        max_group: the largest group that is timed.
        inner: the compiler.
        repeats: rounds; medians over them are returned.
        progress: show on stderr how far it is.

    Raises:
        OptionError: a phase that there is not, or a number out of range.
        CaptureError: the model cannot be traced to one graph with a residual stream.
        FxfuseError: it returns no KV cache that can be cut back.
    """
    if phase not in ("decode", "prefill"):
        raise OptionError(f"phase is decode or prefill, not {phase!r}")
    check_count("max_group", max_group)
    check_count("repeats", repeats)
    own = original(model)
    with eval_mode(own):
        captured = _captured(own, ids, phase)
        copies = captured.copy()
        cutter = Cutter(captured)
        kinds = _kinds(cutter, [branch for stream in cutter.streams for branch in stream.branches])
        if not kinds:
            raise CaptureError("no residual stream was found, so no branch can be timed; fxfuse.explain says what is")
        maps = Cutter(copies, linear=True)
        wanted = _wanted(cutter, kinds, maps, max_group)
        calls = _calls(wanted, inner, progress)
        calls[WHOLE] = _whole(own, Plan(), ids, phase, inner)
        fewer = {number: plan for number, branches in enumerate(kinds) if (plan := _half(branches))}
        calls |= {
            _fewer(number): _whole(_without(own, plan), plan, ids, phase, inner) for number, plan in fewer.items()
        }
        samples = interleave(calls, repeats, SAMPLE, clock_of(ids.device), "branches" if progress else "")
    counts = {name: len(parts) for name, (_, parts) in wanted.items()}
    left_out = {number: len(plan.drop) for number, plan in fewer.items()}
    return _result(cutter, kinds, maps, samples, counts, left_out)


def _captured(model: nn.Module, ids: Tensor, phase: Phase) -> Captured:
    if phase == "prefill":
        graphs = capture(model, input_ids=ids, use_cache=True)
    else:
        cache = {cache_keyword(model): filled_cache(model, ids)}
        graphs = capture(model, input_ids=ids[:, -1:], use_cache=True, **cache)
    if len(graphs) > 1:
        raise CaptureError(f"the model runs through {len(graphs)} graphs: TORCH_LOGS=graph_breaks shows what cuts it")
    return graphs[0]


def _kinds(cutter: Cutter, branches: Sequence[Branch]) -> list[list[Branch]]:
    """Branches that compute the same on the same shapes, together."""
    kinds: dict[object, list[Branch]] = {}
    for branch in branches:
        kinds.setdefault(cutter.part([branch]).key, []).append(branch)
    return list(kinds.values())


def _wanted(
    cutter: Cutter, kinds: Sequence[Sequence[Branch]], maps: Cutter, max_group: int
) -> dict[str, tuple[Cutter, list[Part]]]:
    """The parts that are timed, by name: those of one name compute the same."""
    wanted: dict[str, tuple[Cutter, list[Part]]] = {}
    linear = _by_name(maps)
    for kind, branches in enumerate(kinds):
        wanted[_name(kind, 1)] = cutter, [cutter.part([branch]) for branch in branches]
        for size in _sizes(branches, max_group):
            wanted[_name(kind, size)] = cutter, [cutter.part(group) for group in _groups(cutter, branches, size)]
        if made := [maps.part([linear[branch.name]]) for branch in branches if branch.name in maps.linear]:
            wanted[_name(kind, 0)] = maps, made
    wanted[AGAIN] = wanted[_name(0, 1)]
    return {name: (graph, [p for p in parts if p.key == parts[0].key]) for name, (graph, parts) in wanted.items()}


def _calls(
    wanted: Mapping[str, tuple[Cutter, Sequence[Part]]], inner: str, progress: bool
) -> dict[str, Callable[[], object]]:
    """Calls of all parts of a name, compiled here, once for each name."""
    calls: dict[str, Callable[[], object]] = {}
    with bar("compiling parts", "parts", len(wanted), progress) as advance:
        values: dict[fx.Node, object] = {}
        for graph in {graph for graph, _ in wanted.values()}:
            own = (part for other, parts in wanted.values() if other is graph for part in parts)
            values |= graph.values([node for part in own for node in part.sources])
        for name, (_, parts) in wanted.items():
            calls[name] = _call(parts, [[values[node] for node in part.sources] for part in parts], inner)
            advance(1)
    return calls


def _sizes(branches: Sequence[Branch], max_group: int) -> range:
    """The sizes of groups that are timed of branches of one kind."""
    return range(2, min(max_group, len(branches)) + 1) if branches[0].ffn is not None else range(0)


def _groups(cutter: Cutter, branches: Sequence[Branch], size: int) -> list[list[Branch]]:
    """Groups that share no branch, as many as their packed weights may be."""
    most = max(1, PACKED_BYTES // max(1, size * cutter.parameter_bytes(branches[0])))
    starts = range(0, len(branches) - size + 1, size)
    return [list(branches[start : start + size]) for start in starts][:most]


def _name(kind: int, size: int) -> str:
    """What is timed: ``size`` branches of one kind as one group, alone if that is 1, as a linear map if it is 0."""
    return f"kind {kind}, {'linear' if size == 0 else 'alone' if size == 1 else f'{size} in a group'}"


def _call(parts: Sequence[Part], inputs: Sequence[Sequence[object]], inner: str) -> Callable[[], object]:
    """A call of all ``parts``, which compute the same, as one compiled graph with the inputs of each in turn."""
    with torch.no_grad():
        compiled = ffnfuse(parts[0].gm, list(inputs[0]), {"plan": Plan(), "inner": inner})  # type: ignore[arg-type]  # sizes are fixed

    def call() -> object:
        with torch.no_grad():
            for given in inputs:
                compiled(*given)
        return None

    return call


def _half(branches: Sequence[Branch]) -> Plan:
    """Every second one dropped, so that the first of all stays, whose KV cache the model counts tokens by."""
    known = [branch for branch in branches if branch.kind in _DROPPED]
    return Plan(drop=[branch.name for branch in known[1::2]])


def _fewer(kind: int) -> str:
    return f"the model without half of kind {kind}"


def _without(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy that shares all weights, and what the plan drops has left, if that is modules: as users would have it."""
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    lighter = copy.deepcopy(model, shared)
    try:
        return prune(lighter, plan)
    except PruneError:
        return lighter  # the plan drops it from the graph alone, and its KV cache stays


def _whole(model: nn.Module, plan: Plan, ids: Tensor, phase: Phase, inner: str) -> Callable[[], object]:
    options: Any = {"plan": plan, "inner": inner}  # torch types the values of inductor's options
    program: Program = torch.compile(twin(model), backend="ffnfuse", options=options, dynamic=False, **APART)
    if phase == "decode":
        step = decode_step(program, filled_cache(model, ids), ids[:, -1:])
    else:

        def step() -> object:
            return program(input_ids=ids, use_cache=True)

    def call() -> object:
        with torch.no_grad():
            return step()

    return call


def _by_name(cutter: Cutter) -> dict[str, Branch]:
    """The branches of a graph, in stream order."""
    return {branch.name: branch for stream in cutter.streams for branch in stream.branches}


def _result(
    cutter: Cutter,
    kinds: Sequence[Sequence[Branch]],
    maps: Cutter,
    samples: Samples,
    counts: Mapping[str, int],
    fewer: Mapping[int, int],
) -> BranchTimes:
    """``counts`` says how many parts one call of a name computes, ``fewer`` how many of a kind one did without."""
    linear = _by_name(maps)
    found: dict[str, BranchTime] = {}

    def seconds(name: str) -> float:
        return samples.median(name) / counts[name]

    def in_model(kind: int) -> float:
        if kind not in fewer:
            return seconds(_name(kind, 1))
        return (1 - samples.ratio(_fewer(kind), WHOLE)) * samples.median(WHOLE) / fewer[kind]

    for kind, branches in enumerate(kinds):
        sizes = [size for size in range(2, len(branches) + 1) if _name(kind, size) in counts]
        groups = tuple(seconds(_name(kind, size)) for size in ([1, *sizes] if sizes else []))
        for branch in branches:
            has_map = branch.name in maps.linear
            found[branch.name] = BranchTime(
                name=branch.name,
                seconds=in_model(kind),
                linear=seconds(_name(kind, 0)) if has_map else None,
                groups=groups,
                parameters=cutter.parameter_bytes(branch),
                linear_parameters=maps.parameter_bytes(linear[branch.name]) if has_map else 0,
                cache=cutter.cache_bytes(branch),
                width=0 if branch.ffn is None else branch.ffn.projections[0].width,
                unit_parameters=cutter.unit_bytes(branch),
            )
    apart = abs(samples.ratio(AGAIN, _name(0, 1)) - 1)
    return BranchTimes(samples.median(WHOLE), tuple(map(found.__getitem__, _by_name(cutter))), apart, samples)
