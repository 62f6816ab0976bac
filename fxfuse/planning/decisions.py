"""What became of each edit that a recording suggests, and the plan that follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fxfuse.measure.recording import Recording
from fxfuse.plan import Decision, Plan
from fxfuse.planning.groups import Limits, distance, propose_groups


def propose(recording: Recording, drops: Mapping[str, float], limits: Limits) -> list[Decision]:
    """All of ``drops`` (attentions and their scores) and all groups that ``limits`` allow then; nothing is measured."""
    found = [Decision("drop", (name,), "kept", "among the cheapest", score) for name, score in drops.items()]
    for group in propose_groups(recording, drops, limits):
        found.append(
            Decision("parallel", group, "kept", "consecutive, and within the limits", distance(recording, group))
        )
    return found


def plan_of(recording: Recording, decisions: Iterable[Decision]) -> Plan:
    """The recorded plan and all that was kept, in stream order; why, and what was refused, is kept with it."""
    made = tuple(decisions)
    kept = sorted((d for d in made if d.outcome == "kept"), key=lambda d: recording.index(d.branches[0]))
    base = recording.plan
    return Plan(
        drop=(*base.drop, *dropped(kept)),
        linear=base.linear,
        narrow=base.narrow,
        parallel=(*base.parallel, *(d.branches for d in kept if d.edit == "parallel")),
        why=(*base.why, *made),
    )


def dropped(decisions: Iterable[Decision]) -> list[str]:
    """The attentions whose drops were kept."""
    return [d.branches[0] for d in decisions if d.edit == "drop" and d.outcome == "kept"]
