"""What became of each edit that a recording suggests, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fxfuse.measure.recording import Recording
from fxfuse.plan import Plan
from fxfuse.planning.groups import Limits, distance, propose_groups


@dataclass(frozen=True)
class Decision:
    """What became of one edit, and why.

    Attributes:
        edit: "drop" an attention, or make FFNs "parallel".
        branches: the attention, or the group.
        outcome: "kept", "split" (its halves have decisions of their own) or "refused".
        why: in words.
        score: what it was proposed by: the attention's score, or the group's largest mean distance.
        kl: measured KL of the plan with this edit and those kept before, nats per token; None if not measured.
        added: how much of that is this edit's.
    """

    edit: Literal["drop", "parallel"]
    branches: tuple[str, ...]
    outcome: Literal["kept", "split", "refused"]
    why: str
    score: float
    kl: float | None = None
    added: float | None = None

    def __str__(self) -> str:
        measured = "" if self.kl is None else f", KL {self.kl:.4g}"
        return f"{self.outcome} {self.edit} {' + '.join(self.branches)} (score {self.score:.4g}{measured}): {self.why}"


def propose(recording: Recording, drops: Mapping[str, float], limits: Limits) -> list[Decision]:
    """All of ``drops`` (attentions and their scores) and all groups that ``limits`` allow then; nothing is measured."""
    found = [Decision("drop", (name,), "kept", "among the cheapest", score) for name, score in drops.items()]
    for group in propose_groups(recording, drops, limits):
        found.append(
            Decision("parallel", group, "kept", "consecutive, and within the limits", distance(recording, group))
        )
    return found


def plan_of(recording: Recording, decisions: Iterable[Decision]) -> Plan:
    """The recorded plan and all that was kept, in stream order."""
    kept = sorted((d for d in decisions if d.outcome == "kept"), key=lambda d: recording.index(d.branches[0]))
    base = recording.plan
    return Plan(
        drop=(*base.drop, *dropped(kept)),
        parallel=(*base.parallel, *(d.branches for d in kept if d.edit == "parallel")),
    )


def dropped(decisions: Iterable[Decision]) -> list[str]:
    """The attentions whose drops were kept."""
    return [d.branches[0] for d in decisions if d.edit == "drop" and d.outcome == "kept"]
