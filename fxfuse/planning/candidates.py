"""Candidates: edits that a plan can be made of, each with what it costs and what it saves.

A group of FFNs that attentions stand between is one candidate together with the drops that it needs, so that two
candidates go together unless they name one branch. All solvers (:mod:`fxfuse.planning.solvers`) choose among these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fxfuse.measure.recording import BranchRecord, Recording
from fxfuse.measure.units import narrowed
from fxfuse.plan import Group, Plan, flat
from fxfuse.planning.blocks import Block, block_runs
from fxfuse.planning.costs import Costs, Use
from fxfuse.planning.groups import runs


@dataclass(frozen=True)
class Candidate:
    """One edit, or a group with the drops that it needs.

    Attributes:
        edit: a plan of nothing else.
        cost: KL to the original, nats per token, of that plan by itself.
        gain: what it saves.
    """

    edit: Plan
    cost: float
    gain: Use


def edits(
    recording: Recording, costs: Costs, *, max_group: int = 4, linear: bool = False, narrow: Sequence[float] = ()
) -> tuple[Plan, ...]:
    """What may be done to the branches that the recorded plan leaves alone, each edit as a plan of its own.

    Drops of attentions, FFNs and experts; attentions made linear; FFNs narrowed to the units that are worth most
    (Puzzle's ranking), where the costs tell what that saves; and what stands in parallel, if that takes less time:
    intervals of up to ``max_group`` FFNs that follow each other once the attentions between them are gone; two layers,
    attention beside attention and FFN beside FFN (Layer Parallelism, arXiv 2502.02790); and windows of up to
    ``max_group`` whole blocks (arXiv 2503.18908, appendix B), which save all-reduces.

    Args:
        recording: of the model.
        costs: which tell what a linear map fits.
        max_group: FFNs in a group.
        linear: whether attentions may be made linear, which takes text to fit their maps on.
        narrow: the shares of its hidden units that an FFN may keep.

    Raises:
        RecordError: FFNs may be narrowed, and the recording was made before their units were recorded.
        OptionError: a share is not between 0 and 1.
    """
    free = [branch for branch in recording.branches if branch.name not in recording.plan.names]
    attentions = [branch.name for branch in free if branch.kind == "attention"]
    made = [Plan(drop=[branch.name]) for branch in free if branch.kind in ("attention", "gated_ffn", "ffn", "moe")]
    if linear:
        made += [Plan(linear=[name]) for name in attentions if costs[name].linear is not None]
    narrowable = [branch.name for branch in free if branch.width and len(costs[branch.name].groups) > 1]
    made += [Plan(narrow={name: narrowed(recording, name, share)}) for name in narrowable for share in narrow]
    for run in runs(recording, attentions):
        for start in range(len(run)):
            for end in range(start + 2, min(start + max_group, len(run)) + 1):
                group = run[start:end]
                if costs.gain(Plan(parallel=[group])).seconds > 0:
                    made.append(Plan(drop=_between(recording, group), parallel=[group]))
    beside = [edit for run in block_runs(recording) for edit in _blocks(run, max_group)]
    return (*made, *(edit for edit in beside if costs.gain(edit).seconds > 0))


def _blocks(run: Sequence[Block], max_group: int) -> Iterator[Plan]:
    """Two layers beside each other, and windows of whole blocks, of one run of blocks."""
    for start in range(len(run) - 1):
        yield Plan(parallel=list(zip(*run[start : start + 2], strict=True)))
        for end in range(start + 2, min(start + max_group, len(run)) + 1):
            yield Plan(parallel=[run[start:end]])


def candidates(costs: Costs, measured: Mapping[Plan, float]) -> tuple[Candidate, ...]:
    """Edits and their KL as candidates, with what they save."""
    return tuple(Candidate(edit, kl, costs.gain(edit)) for edit, kl in measured.items())


def together(recording: Recording, chosen: Iterable[Plan]) -> Plan:
    """The recorded plan and all edits of ``chosen``, in stream order.

    Raises:
        PlanError: two of them name one branch.
    """
    given = tuple(chosen)

    def place(name: str) -> int:
        return recording.index(name)

    base = recording.plan
    return Plan(
        drop=(*base.drop, *sorted((name for edit in given for name in edit.drop), key=place)),
        linear=(*base.linear, *sorted((name for edit in given for name in edit.linear), key=place)),
        narrow=dict(
            sorted((entry for edit in (base, *given) for entry in edit.narrow.items()), key=lambda e: place(e[0]))
        ),
        parallel=(
            *base.parallel,
            *sorted((group for edit in given for group in edit.parallel), key=lambda group: place(flat(group)[0])),
        ),
    )


def apart(plan: Plan, recording: Recording) -> tuple[Plan, ...]:
    """The edits that ``plan`` adds to the recorded one, as :func:`edits` would have them: the way back from it."""
    base = recording.plan
    groups = [group for group in plan.parallel if group not in base.parallel]
    drops = [name for name in plan.drop if name not in base.drop]
    made: list[Plan] = []
    while groups:
        group, *groups = groups
        if groups and _are_layers(recording, group, groups[0]):
            made.append(Plan(parallel=[group, groups.pop(0)]))
            continue
        needed = [name for name in _between(recording, flat(group)) if name in drops]
        drops = [name for name in drops if name not in needed]
        made.append(Plan(drop=needed, parallel=[group]))
    made += [Plan(drop=[name]) for name in drops]
    made += [Plan(linear=[name]) for name in plan.linear if name not in base.linear]
    made += [Plan(narrow={name: units}) for name, units in plan.narrow.items() if name not in base.narrow]
    return tuple(made)


def _are_layers(recording: Recording, one: Group, other: Group) -> bool:
    """Whether two groups are the attentions, and the FFNs, of two layers that stand beside each other."""
    if not len(one) == len(other) == 2:
        return False
    pairs = [*zip(one, other, strict=True)]
    return any(pairs == [*run[start : start + 2]] for run in block_runs(recording) for start in range(len(run)))


def _between(recording: Recording, group: tuple[str, ...]) -> list[str]:
    """The attentions between the first and the last of ``group`` that the recorded plan has not dropped."""
    first, last = (recording.branches[recording.index(name)] for name in (group[0], group[-1]))

    def inside(branch: BranchRecord) -> bool:
        return branch.stream == first.stream and first.adds < branch.adds < last.adds

    def names() -> Iterator[str]:
        for branch in recording.branches:
            if inside(branch) and branch.kind == "attention" and branch.name not in recording.plan.drop:
                yield branch.name

    return list(names())
