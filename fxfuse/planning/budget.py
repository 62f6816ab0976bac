"""Edits within a budget: each is measured together with all that were kept before it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

from fxfuse.errors import NotFiniteError, PlanError
from fxfuse.measure.recording import Recording
from fxfuse.plan import Decision, Plan
from fxfuse.planning.decisions import dropped, plan_of
from fxfuse.planning.groups import Limits, distance, follow, in_two, promise, propose_groups, recorded_kl

log = logging.getLogger(__name__)

Cost: TypeAlias = Callable[[Plan], float]
"""What a plan costs, nats per token. PlanError if it cannot be applied, NotFiniteError if it makes NaN."""


def search(
    recording: Recording,
    drops: Mapping[str, float],
    limits: Limits,
    cost: Cost,
    max_kl: float,
    *,
    count: int | None = None,
    drop_share: float = 0.5,
    final: Cost | None = None,
) -> list[Decision]:
    """Those of the drops and groups whose plan costs at most ``max_kl``, as measured.

    1. Drops, in the order given, as long as the plan costs no more than ``drop_share * max_kl``.
    2. Groups, the best promise first. A group may add its share of what is left of ``max_kl``: the part that the FFN
       steps it saves are of those that all groups not yet decided would save. What it does not use is left for the
       others. A group that adds more is split in two, and its halves are groups not yet decided.
    3. The plan is measured by ``final``; while it costs more than ``max_kl``, the costliest edit is taken back, and
       with a drop the groups that cannot do without it.

    What is recorded to add more by itself than it may is not measured.

    Args:
        recording: of the model.
        drops: attentions and their scores, cheapest first.
        limits: of groups.
        cost: what a plan costs.
        max_kl: the budget, nats per token.
        count: at most so many drops.
        drop_share: the part of ``max_kl`` that the drops may take.
        final: what the plan costs in the end, measured on more tokens, say; ``cost`` if None.

    Raises:
        PlanError: the recorded plan alone cannot be applied, or costs more than ``max_kl``.
    """
    found = _Search(recording, cost, cost(recording.plan))
    if not found.kl <= max_kl:
        raise PlanError(_no_budget(found.kl, max_kl))
    for name, score in drops.items():
        if count is not None and len(dropped(found.decisions)) >= count:
            break
        alone = float(recording.kl[recording.index(name)])
        found.decide(Decision("drop", (name,), "refused", "", score), drop_share * max_kl - found.kl, alone)
    waiting = list(propose_groups(recording, dropped(found.decisions), limits))
    while waiting:
        waiting.sort(key=lambda group: promise(recording, group))
        group = waiting.pop(0)
        steps = len(group) - 1
        share = (max_kl - found.kl) * steps / (steps + sum(len(other) - 1 for other in waiting))
        halves = [half for half in in_two(recording, group) if len(half) > 1]
        trial = Decision("parallel", group, "split" if halves else "refused", "", distance(recording, group))
        if not found.decide(trial, share, recorded_kl(recording, group)):
            waiting += halves
    return _settle(recording, found.decisions, final or cost, max_kl)


class _Search:
    """The plan so far, as decisions, and what it costs."""

    def __init__(self, recording: Recording, cost: Cost, kl: float) -> None:
        self._recording, self._cost, self.kl = recording, cost, kl
        self.decisions: list[Decision] = []

    def decide(self, trial: Decision, share: float, alone: float) -> bool:
        """Keep the edit of ``trial`` if it adds no more than ``share`` to the cost; else it is what ``trial`` says.

        ``alone`` is what it is recorded to add; NaN if that is not known.
        """
        if alone > share:
            made = replace(trial, why=f"recorded to add {alone:.4g} by itself; it may add {max(share, 0.0):.4g}")
        else:
            made = self._measured(trial, share)
        log.info("%s", made)
        self.decisions.append(made)
        return made.outcome == "kept"

    def _measured(self, trial: Decision, share: float) -> Decision:
        kept = replace(trial, outcome="kept")
        try:
            kl = self._cost(plan_of(self._recording, [*self.decisions, kept]))
        except (PlanError, NotFiniteError) as error:
            return replace(trial, why=str(error))
        added = kl - self.kl
        if added <= share:
            self.kl, trial = kl, kept
        return replace(trial, kl=kl, added=added, why=f"adds {added:.4g}; it may add {share:.4g}")


def _settle(recording: Recording, decisions: list[Decision], final: Cost, max_kl: float) -> list[Decision]:
    """Take back the costliest edit, again and again, until the plan costs no more than ``max_kl``."""
    while True:
        try:
            kl = final(plan_of(recording, decisions))
        except NotFiniteError:
            kl = math.inf
        if kl <= max_kl:
            log.info("the plan costs %.4g nats per token, and may cost %.4g", kl, max_kl)
            return decisions
        kept = [decision for decision in decisions if decision.outcome == "kept"]
        if not kept:
            raise PlanError(_no_budget(kl, max_kl))
        worst = max(kept, key=lambda decision: decision.added or 0.0)
        why = f"taken back: the plan as a whole costs {kl:.4g}, above {max_kl:.4g}"
        log.info("%s: %s", " + ".join(worst.branches), why)
        decisions = [replace(d, outcome="refused", why=why) if d is worst else d for d in decisions]
        decisions = _without_broken(recording, decisions)


def _without_broken(recording: Recording, decisions: list[Decision]) -> list[Decision]:
    """Take back the groups whose FFNs no longer follow each other."""
    drops = dropped(decisions)
    why = "taken back with a drop that it cannot do without"
    return [
        replace(d, outcome="refused", why=why)
        if d.edit == "parallel" and d.outcome == "kept" and not follow(recording, d.branches, drops)
        else d
        for d in decisions
    ]


def _no_budget(kl: float, max_kl: float) -> str:
    return (
        f"the plan that the recording was made under costs {kl:.4g} nats per token by itself, above "
        f"max_kl={max_kl:.4g}: allow more, or record under fewer drops"
    )
