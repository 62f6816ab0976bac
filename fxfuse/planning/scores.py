"""Which attention is cheap to lose: scores of a recording, and the choice by them."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

from fxfuse._common.bounds import check_bound
from fxfuse.errors import OptionError, RecordError, nearest
from fxfuse.measure.recording import BranchRecord, Recording

Score: TypeAlias = Literal["kl", "cosine", "norm_ratio"]
"""What to judge a branch by; each is small where the branch does little.

- ``kl``: how far the next-token distribution moves without it, nats per token (Puzzle, arXiv 2411.19146).
- ``cosine``: 1 - cos of the stream before and after it (LLM-Drop, arXiv 2406.15786).
- ``norm_ratio``: how long its contribution is, relative to the stream.
"""


def check_score(by: str) -> None:
    """Raise OptionError unless ``by`` names a score."""
    if by not in get_args(Score):
        raise OptionError(
            f"there is no score {by!r}{nearest(str(by), get_args(Score))}; it is one of {get_args(Score)}"
        )


def attention_scores(recording: Recording, by: Score = "kl") -> dict[str, float]:
    """The score of each attention that the recorded plan leaves alone, by name, in stream order.

    Raises:
        OptionError: no such score.
        RecordError: the recording lacks it.
    """
    check_score(by)
    values = 1 - recording.cosine if by == "cosine" else getattr(recording, by)
    found = {
        branch.name: float(values[index])
        for index, branch in enumerate(recording.branches)
        if _droppable(recording, branch)
    }
    if any(math.isnan(value) for value in found.values()):
        other = "choose score='cosine', or record a model that returns logits" if by == "kl" else "record again"
        raise RecordError(f"this recording has no {by} of some attentions: {other}")
    return found


def cheapest(
    recording: Recording, drop: int | float | None = None, by: Score = "kl", max_score: float | None = None
) -> dict[str, float]:
    """The attentions to drop and their scores, cheapest first.

    Args:
        recording: of the model.
        drop: how many (an int), or what fraction of the attentions that are left (a float, 0..1, rounded down); as many
            as ``max_score`` allows if None.
        by: the score.
        max_score: what the scores of the chosen ones may add up to. With ``by="kl"`` it is Puzzle's estimate of what
            they cost together.

    Raises:
        OptionError: a number out of range.
        RecordError: the recording lacks the score.
    """
    count = how_many(recording, drop)
    check_bound("max_score", max_score, "what the scores may add up to")
    scores = attention_scores(recording, by) if count else {}
    chosen: dict[str, float] = {}
    for name in sorted(scores, key=scores.__getitem__)[:count]:
        if max_score is not None and sum(chosen.values()) + scores[name] > max_score:
            break
        chosen[name] = scores[name]
    return chosen


def how_many(recording: Recording, drop: int | float | None) -> int:
    """The number of attentions that ``drop`` stands for, see :func:`cheapest`; all of them if None.

    Raises:
        OptionError: neither a number of attentions nor a fraction of them.
    """
    there = sum(_droppable(recording, branch) for branch in recording.branches)
    if drop is None:
        return there
    if isinstance(drop, bool) or not isinstance(drop, int | float):
        raise OptionError(f"drop is a number of attentions (3) or a fraction of them (0.25), not {drop!r}")
    if isinstance(drop, float):
        if not 0 <= drop <= 1:
            raise OptionError(f"drop={drop} is no fraction: give one of 0..1, or a whole number of attentions")
        return math.floor(drop * there + 1e-9)  # 0.29 * 100 is a little less than 29
    if not 0 <= drop <= there:
        raise OptionError(f"drop={drop}, but there are {there} attentions to drop")
    return drop


def _droppable(recording: Recording, branch: BranchRecord) -> bool:
    return branch.kind == "attention" and branch.name not in recording.plan.names
