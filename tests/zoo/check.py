"""One net of the zoo against what its modules say and compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from torch import Tensor

import fxfuse
from fxfuse.errors import FxfuseError
from fxfuse.report.explanation import BranchInfo
from fxfuse.report.possible import LONELY
from tests.zoo.anatomy import Anatomy, Block, dissect
from tests.zoo.nets import Entry, Net, by_default
from tests.zoo.reference import (
    in_parallel,
    made_linear,
    multiplies_its_stream,
    narrowed,
    outputs,
    silenced,
    width_read,
)

TOLERANCE = 1e-8
RATIO = 2.0
"""How much larger the error of a fused model in float32 may be than that of the model itself in float32."""

EXACT, OFF = "exact", "off by "

ROUNDED = "to fold it would spare that rounding"
"""What the library says of norms that compute in float32 in a model that is in float64."""


@dataclass
class Result:
    """What was seen of one net. Errors are relative to the largest number of the output.

    Attributes:
        name: the net.
        origin: the package that it comes from.
        failed: why it could not be built, or what went wrong afterwards; empty if nothing did.
        built: whether it could be built and called.
        parts: how many attentions, other mixers, FFNs and mixtures of experts its modules ran.
        kinds: how many branches of each kind the library found.
        graphs: how many graphs Dynamo made of it.
        drop: the branches that the plan drops.
        group: the members of the plan's one group.
        unplanned: why there is no plan, or none with a group.
        fused: what became of the branches of the group: by name, "wide", "gate_up" or the reason why neither.
        refusals: the reasons why the FFNs that were found can be a part of no wide one, by how many they hold for.
        empty_error: of the compiled model under an empty plan, to the model.
        planned_error: of the compiled model under the plan, to the reference.
        effect: how far the reference under the plan is from the model.
        single: where norms that are float32 in any model keep FFNs apart in float64, what becomes of them in float32.
        narrow, linear: what came of a plan that narrows one FFN, and of one that makes one attention linear: "exact",
            how far off it was, or why it was not compared.
        ratio: of the error under the plan in float32 to that of the reference in float32, both to float64.
        seconds: that all of it took.
    """

    name: str
    origin: str
    failed: str = ""
    built: bool = False
    parts: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    drop: list[str] = field(default_factory=list)
    group: list[object] = field(default_factory=list)
    unplanned: str = ""
    fused: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    empty_error: float | None = None
    planned_error: float | None = None
    effect: float | None = None
    narrow: str = ""
    linear: str = ""
    single: dict[str, str] = field(default_factory=dict)
    ratio: float | None = None
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether all comparisons came out equal and told something; that under an empty plan must have been made."""
        told = self.effect is None or self.effect > 100 * TOLERANCE
        equal = (self.planned_error or 0) <= TOLERANCE and (self.ratio or 0) <= RATIO
        equal = equal and not (self.narrow + self.linear).count(OFF)
        return not self.failed and self.empty_error is not None and self.empty_error <= TOLERANCE and equal and told

    @property
    def miscounted(self) -> str:
        """Where the two counts differ; empty if they agree. A part that the library calls "other" is not found."""
        modules = {part: self.parts.get(part, 0) for part in ("attention", "ffn", "moe")}
        modules["ffn"] += self.parts.get("shared", 0)
        seen = {kind: self.kinds.get(kind, 0) for kind in ("attention", "moe")}
        seen["ffn"] = self.kinds.get("ffn", 0) + self.kinds.get("gated_ffn", 0)
        return ", ".join(f"{seen[part]} {part} of {count}" for part, count in modules.items() if seen[part] != count)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def check(entry: Entry) -> Result:
    """Build a net, count its branches, and compare it compiled, with and without a plan, with its modules."""
    result, start = Result(entry.name, entry.origin), time.monotonic()
    with by_default(torch.float64):
        try:
            net = entry.build()
            result.built = True
            _check(net, result)
        except Exception as error:
            result.failed = f"{type(error).__name__}: {str(error).strip()}"[:600]
    result.seconds = round(time.monotonic() - start, 1)
    return result


def _check(net: Net, result: Result) -> None:
    anatomy = dissect(net.model, net.inputs)
    result.parts = {part: count for part, count in anatomy.calls.items() if count}
    plain = outputs(net.model, net.inputs)
    found = fxfuse.explain(net.model, **net.inputs)
    result.graphs = found.graphs
    kinds = [branch.kind for branch in found.branches]
    result.kinds = {str(kind): kinds.count(kind) for kind in dict.fromkeys(kinds)}
    alone = fxfuse.Plan()
    ffns = [b for b in found.branches if b.kind in ("ffn", "gated_ffn") and not b.joins]
    reasons = [b.reason for b in ffns if b.reason not in ("", LONELY)]
    result.refusals = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
    result.empty_error = error(_compiled(net, alone), plain)
    result.narrow, result.linear = (_alone(net, anatomy, found.branches, plain, kind) for kind in ("ffn", "attention"))
    planned = choose(anatomy, found.branches) if found.branches else _no_stream(found)
    if isinstance(planned, str):
        result.unplanned = planned
        return
    plan, blocks = planned
    result.drop = list(plan.drop)
    if not plan.parallel:
        result.unplanned = "only dropped, it has no FFN"
        _check_drops(net, plan, blocks, plain, result)
        return
    try:
        explained = fxfuse.explain(net.model, plan=plan, **net.inputs)
    except FxfuseError as refusal:
        result.unplanned = f"only dropped, a group is refused: {refusal}"
        if plan.drop:
            _check_drops(net, plan, blocks, plain, result)
        return
    result.group = [_plain(member) for member in plan.parallel[0]]
    members = set(_flat(result.group))
    result.fused = {b.name: b.fused or b.reason for b in explained.branches if b.name in members}
    if multiplies_its_stream(net.model, net.inputs, blocks):
        result.unplanned = (
            "its plan is compared in tests/integration/test_scaled_families.py: its layers multiply the stream, so "
            "hooks cannot tell what they add"
        )
        return
    with in_parallel(blocks):
        expected = outputs(net.model, net.inputs)
    result.planned_error, result.effect = error(_compiled(net, plan), expected), error(plain, expected)
    if any(ROUNDED in why for why in result.fused.values()):
        with by_default(torch.float32):
            _check_single(net.single(), plan, blocks, expected, result)


def _alone(
    net: Net, anatomy: Anatomy, branches: Sequence[BranchInfo], plain: Tensor, part: Literal["ffn", "attention"]
) -> str:
    """Narrow the first FFN that is alone in its layer to every other unit, or make the first such attention linear."""
    pairs = (
        (site, found)
        for stack in anatomy.stacks[:1]
        for block in stack
        for site in block.sites
        if site.part == part and sum(other.part == part for other in block.sites) == 1
        if len(found := [b for b in _branches_of(block, branches) if b.kind.endswith(part)]) == 1
    )
    site, found = next(pairs, (None, []))
    if site is None:
        return f"no layer with one {part}"
    name = found[0].name
    if part == "ffn" and not site.whole:
        return "not compared, because its projections are in several modules"
    if part == "ffn":
        keep = [unit % 2 == 0 for unit in range(width_read(net.model, net.inputs, site.last))]
        plan = fxfuse.Plan(narrow={name: range(0, len(keep), 2)})
        changed = narrowed(site.last, keep)
    else:
        plan, changed = fxfuse.Plan(linear=[name]), made_linear(net.model.get_submodule(site.path), site.last)
    try:
        made = _compiled(net, plan)
    except Exception as refusal:
        return _reason(refusal)
    try:
        with changed:
            expected = outputs(net.model, net.inputs)
    except ValueError as reason:
        return f"not compared, because {reason}"
    far, effect = error(made, expected), error(plain, expected)
    if effect <= 100 * TOLERANCE:
        return f"{OFF}nothing, and changed nothing"
    return EXACT if far <= TOLERANCE else f"{OFF}{far:.0e}"


def _reason(refusal: Exception) -> str:
    """Why a plan was refused; any other error goes on."""
    error: BaseException | None = refusal
    while error is not None and not isinstance(error, FxfuseError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    if error is None:
        raise refusal
    return f"refused: {error}"


def _no_stream(found: fxfuse.Explanation) -> str:
    if found.graphs > 1:
        return f"no stream: graph breaks cut it into {found.graphs} graphs, and no layer lies whole in one"
    return f"no stream: {found.seen[0].why}"


def _check_drops(net: Net, plan: fxfuse.Plan, blocks: Sequence[Block], plain: Tensor, result: Result) -> None:
    """The drops of a plan alone."""
    try:
        with silenced(blocks):
            expected = outputs(net.model, net.inputs)
    except ValueError as reason:
        result.unplanned += f"; not compared, because {reason}"
        return
    result.planned_error = error(_compiled(net, fxfuse.Plan(drop=plan.drop)), expected)
    result.effect = error(plain, expected)


def _check_single(net: Net, plan: fxfuse.Plan, blocks: Sequence[Block], exact: Tensor, result: Result) -> None:
    """The same plan in float32: the error of the compiled model against that of the plain one."""
    torch.compiler.reset()
    explained = fxfuse.explain(net.model, plan=plan, **net.inputs)
    result.single = {b.name: b.fused or b.reason for b in explained.branches if b.name in result.fused}
    with in_parallel(blocks):
        plain = outputs(net.model, net.inputs)
    own, found = ((made.double() - exact).norm() for made in (plain, _compiled(net, plan)))
    result.ratio = float(found / own)


def _compiled(net: Net, plan: fxfuse.Plan) -> Tensor:
    torch.compiler.reset()
    compiled: Callable[..., object] = torch.compile(
        net.model, backend="ffnfuse", options={"plan": plan, "inner": "eager"}, dynamic=False
    )
    return outputs(compiled, net.inputs)


def error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape or not bool(expected.isfinite().all()):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def choose(anatomy: Anatomy, branches: Sequence[BranchInfo]) -> tuple[fxfuse.Plan, Sequence[Block]] | str:
    """Layers around the middle whose mixers a plan drops and whose FFNs it groups; or why there are none."""
    if not anatomy.stacks:
        return "no list of layers among its modules"
    stack = anatomy.stacks[0]
    with_ffn = [block for block in stack if _has(block, "ffn", "moe")]
    if not with_ffn and any(_has(block, "ffn", "moe") for other in anatomy.stacks for block in other):
        return "no list of layers: its attentions are in one list of modules, its FFNs in another"
    blocks = _middle(stack) if with_ffn else stack[len(stack) // 3 : len(stack) - len(stack) // 3]
    if len(with_ffn) == 1:
        return "one layer with an FFN"
    own = {block.path: _branches_of(block, branches) for block in blocks}
    if any(branch.name.startswith("@") for branch in branches) and not all(own.values()):
        holds = next((f"; {b.name}: {b.reason}" for b in branches if "of its own" in b.reason), "")
        return f"some of its branches have no module of their own, so no name tells whose they are{holds}"
    drop, members = [], []
    for block in blocks:
        mixers = [site.path for site in block.sites if site.part in ("attention", "mixer")]
        found = [branch.name for branch in own[block.path]]
        gone = [name for name in found if any(_inside(name, path) for path in mixers)]
        kept = [name for name in found if name not in gone]
        if len(gone) < len(mixers) or (_has(block, "ffn", "moe") and not kept):
            return _too_few(block, own[block.path])
        drop += gone
        if kept:
            members.append(kept[0] if len(kept) == 1 else tuple(kept))
    return fxfuse.Plan(drop=drop, parallel=[members] if with_ffn else []), blocks


def _too_few(block: Block, branches: Sequence[BranchInfo]) -> str:
    """What a layer holds, by its modules and by the library."""
    parts = " and ".join(site.part for site in block.sites)
    seen = ", ".join(f"{branch.name} ({branch.reason or branch.kind})" for branch in branches)
    return f"{block.path} holds {parts}, and of that the library finds {seen or 'nothing'}"


def _middle(stack: Sequence[Block]) -> Sequence[Block]:
    """The middle third; as much more as it takes for two dense FFNs, or two FFNs of any sort."""
    start, stop = len(stack) // 3, len(stack) - len(stack) // 3
    for parts in (("ffn",), ("ffn", "moe")):
        low, high = start, stop
        while sum(_has(block, *parts) for block in stack[low:high]) < 2 and (low > 0 or high < len(stack)):
            downwards = low > 0 and (high - stop > start - low or high == len(stack))
            low, high = (low - 1, high) if downwards else (low, high + 1)
        if sum(_has(block, *parts) for block in stack[low:high]) >= 2:
            return stack[low:high]
    return stack[start:stop]


def _has(block: Block, *parts: str) -> bool:
    return any(site.part in parts for site in block.sites)


def _branches_of(block: Block, branches: Sequence[BranchInfo]) -> list[BranchInfo]:
    return [branch for branch in branches if _inside(branch.name, block.path)]


def _inside(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def _plain(member: str | Sequence[str]) -> str | list[str]:
    return member if isinstance(member, str) else list(member)


def _flat(group: Sequence[object]) -> list[str]:
    return [name for member in group for name in ([member] if isinstance(member, str) else member)]  # type: ignore[misc, attr-defined]


def from_dict(data: Mapping[str, object]) -> Result:
    return Result(**data)  # type: ignore[arg-type]  # written by to_dict
