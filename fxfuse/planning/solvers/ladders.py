"""Rules from the literature, as ladders: plans in the order in which the rule makes them, each saving more.

A target is reached by the first rung that saves enough (:func:`first_within`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from fxfuse.measure.recording import Recording
from fxfuse.plan import Plan
from fxfuse.planning.blocks import Block, block_runs, block_windows
from fxfuse.planning.groups import Limits, propose_groups
from fxfuse.planning.scores import Score, cheapest

Ladder: TypeAlias = Callable[[Recording], Iterator[Plan]]


def paper(recording: Recording) -> Iterator[Plan]:
    """FFN Fusion (arXiv 2503.18908): attentions of least KL leave; each run of FFNs but its last one is one group.

    The paper's attentions were chosen by Puzzle (arXiv 2411.19146), whose score the KL is. Memory parts its runs; what
    is recorded here needs no parting.
    """
    for drop in _dropped(recording, "kl"):
        groups = propose_groups(recording, drop, Limits(keep_last=True))
        yield _over(recording, Plan(drop=_ordered(recording, drop), parallel=groups))


def paper_windows(recording: Recording, size: int = 4) -> Iterator[Plan]:
    """Its appendix B: whole blocks in parallel, greedy over windows that depend on each other least.

    They run in parallel on several devices; on one they save nothing.
    """
    windows = block_windows(recording, size)
    for count in range(1, len(windows) + 1):
        yield _over(recording, Plan(parallel=windows[:count]))


def layer_parallelism(recording: Recording) -> Iterator[Plan]:
    """Layer Parallelism (arXiv 2502.02790): pairs of whole layers, a stretch of them that ends late.

    Both attentions of a pair read one point, and both FFNs another, where they are one wide FFN. The paper ends the
    stretch a few layers before the last; here it ends where, of all stretches of its length, the layers depend on each
    other least.
    """
    runs = [run for run in block_runs(recording) if len(run) > 1]
    longest = max((len(run) // 2 for run in runs), default=0)

    def dependence(stretch: Sequence[Block]) -> float:
        pairs = zip(stretch[::2], stretch[1::2], strict=True)
        return sum(_distance(recording, one, other) for one, other in pairs)

    for pairs in range(1, longest + 1):
        stretches = [run[at : at + 2 * pairs] for run in runs for at in range(len(run) - 2 * pairs + 1)]
        best = min(stretches, key=dependence)
        groups = [
            group for one, other in zip(best[::2], best[1::2], strict=True) for group in zip(one, other, strict=True)
        ]
        yield _over(recording, Plan(parallel=groups))


def llm_drop(recording: Recording) -> Iterator[Plan]:
    """LLM-Drop (arXiv 2406.15786): attentions leave, those that turn the stream least first."""
    for drop in _dropped(recording, "cosine"):
        yield _over(recording, Plan(drop=_ordered(recording, drop)))


def short_gpt(recording: Recording, influence: Mapping[Block, float] | None = None) -> Iterator[Plan]:
    """ShortGPT (arXiv 2403.03853): whole blocks leave, those of least influence first.

    Args:
        recording: of the model.
        influence: of each block, 1 - cos of the stream before and after it
            (:func:`fxfuse.measure.influence.block_influence`); where it is not known, that of its two branches added.
    """
    blocks = [block for run in block_runs(recording) for block in run]
    known = influence or {}
    score = {block: known.get(block, sum(_turn(recording, name) for name in block)) for block in blocks}
    order = sorted(blocks, key=score.__getitem__)
    for count in range(1, len(order) + 1):
        yield _over(recording, Plan(drop=_ordered(recording, (name for block in order[:count] for name in block))))


LADDERS: Mapping[str, Ladder] = {
    "FFN Fusion": paper,
    "FFN Fusion, whole blocks": paper_windows,
    "Layer Parallelism": layer_parallelism,
    "LLM-Drop": llm_drop,
    "ShortGPT": short_gpt,
}


def first_within(plans: Iterable[Plan], seconds: Callable[[Plan], float], most: float) -> Plan | None:
    """The first plan that takes no more than ``most`` seconds; None if none does."""
    return next((plan for plan in plans if seconds(plan) <= most), None)


def _dropped(recording: Recording, score: Score) -> Iterator[tuple[str, ...]]:
    """The cheapest attention, the two cheapest, ..."""
    order = tuple(cheapest(recording, None, score))
    for count in range(1, len(order) + 1):
        yield order[:count]


def _ordered(recording: Recording, names: Iterable[str]) -> list[str]:
    return sorted(names, key=recording.index)


def _over(recording: Recording, plan: Plan) -> Plan:
    """``plan`` with what the recorded model follows already."""
    base = recording.plan
    drop, parallel = (*base.drop, *plan.drop), (*base.parallel, *plan.parallel)
    return Plan(drop=drop, linear=base.linear, narrow=base.narrow, parallel=parallel)


def _distance(recording: Recording, one: Block, other: Block) -> float:
    """The largest recorded mean distance of a branch of ``other`` if one of ``one`` is dropped."""
    return max(float(recording.mean[recording.index(a), recording.index(b)]) for a in one for b in other)


def _turn(recording: Recording, name: str) -> float:
    return 1 - float(recording.cosine[recording.index(name)])
