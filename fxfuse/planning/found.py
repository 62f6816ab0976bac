"""What a search for a plan found: the plan, and all that were tried, predicted and measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeAlias

from fxfuse.measure.recording import Recording
from fxfuse.plan import Decision, Plan, flat
from fxfuse.planning.candidates import apart
from fxfuse.planning.costs import Costs, Use

Kind: TypeAlias = Literal["drop", "linear", "narrow", "parallel"]


@dataclass(frozen=True)
class Trial:
    """One plan that was tried.

    Attributes:
        plan: the plan.
        predicted: its KL by the sum of its edits' and their pairs', nats per token.
        kl: as measured, unhealed.
        healed: as measured after healing; None if it was not healed.
        use: what the model then needs, predicted from what its branches cost.
        step: where it comes from: "pool" or "exchange".
    """

    plan: Plan
    predicted: float
    kl: float
    healed: float | None
    use: Use
    step: str

    @property
    def final(self) -> float:
        """The KL that counts: healed, if it was."""
        return self.kl if self.healed is None else self.healed


@dataclass(frozen=True)
class Search:
    """What :func:`fxfuse.planning.find_plan` found; ``str()`` is a table.

    Attributes:
        plan: the best of all that were tried; its ``why`` tells of each edit.
        trials: all of them, the best first.
        edits: the KL of each edit by itself, nats per token.
        costs: of the branches.
    """

    plan: Plan
    trials: tuple[Trial, ...]
    edits: Mapping[Plan, float]
    costs: Costs

    @property
    def best(self) -> Trial:
        return self.trials[0]

    def __str__(self) -> str:
        lines = [f"{'':>3} {'from':8} {'time':>6} {'KV, MB':>8} {'predicted':>9} {'KL':>8} {'healed':>8}  edits"]
        for number, trial in enumerate(self.trials):
            healed = "" if trial.healed is None else f"{trial.healed:.4f}"
            time, cache = trial.use.seconds / self.costs.whole, trial.use.cache / 1e6
            lines.append(
                f"{number:>3} {trial.step:8} {time:6.1%} {cache:8.2f} {trial.predicted:9.4f} {trial.kl:8.4f} "
                f"{healed:>8}  {shape(trial.plan)}"
            )
        kind = "modelled" if self.costs.modelled else "measured"
        busy = f"; void: two copies of one program differ by {self.costs.apart:.1%}" if self.costs.void else ""
        lines.append(f"time of {self.costs.phase}, predicted from {kind} branches ({self.costs.where}){busy}")
        return "\n".join(lines)

    def results(self) -> list[dict[str, object]]:
        """Each trial as a point of a picture: name, latency in seconds, KL unhealed and healed, whether chosen."""
        return [
            {
                "name": shape(trial.plan),
                "solver": f"fxfuse, {trial.step}",
                "latency": trial.use.seconds,
                "kl": trial.kl,
                "healed_kl": trial.healed,
                "chosen": trial is self.best,
            }
            for trial in self.trials
        ]

    def to_json(self) -> str:
        """All of it, as a JSON object."""
        trials = [{**asdict(replace(t, plan=Plan())), "plan": json.loads(t.plan.to_json())} for t in self.trials]
        edits = [{"plan": json.loads(edit.to_json()), "kl": kl} for edit, kl in self.edits.items()]
        found = {"plan": json.loads(self.plan.to_json()), "trials": trials, "edits": edits}
        return json.dumps({**found, "costs": json.loads(self.costs.to_json())}, indent=2)


def shape(plan: Plan) -> str:
    """A plan in a few words."""
    words = [f"{len(plan.drop)} dropped"] * bool(plan.drop)
    words += [f"{len(plan.linear)} linear"] * bool(plan.linear)
    words += [f"{len(plan.narrow)} narrowed"] * bool(plan.narrow)
    words += [f"{len(plan.parallel)} groups of {sum(map(len, plan.parallel))}"] * bool(plan.parallel)
    return ", ".join(words) or "nothing"


def decisions(recording: Recording, costs: Costs, edits: Mapping[Plan, float], best: Trial) -> tuple[Decision, ...]:
    """What became of each edit of one branch, and of the groups that were kept, in stream order."""
    made: list[Decision] = []

    def tell(edit: Plan, kind: Kind, names: tuple[str, ...], why: str, kl: float | None) -> None:
        saves = f"{why}; it saves {costs.gain(edit).seconds / costs.whole:.2%} of the time"
        made.append(Decision(kind, names, "refused" if kl is None else "kept", saves, edits.get(edit, 0.0), kl))

    for edit in apart(best.plan, recording):
        for group in edit.parallel:
            tell(edit, "parallel", flat(group), "in the best plan tried, with the drops that it needs", best.final)
        reason = "which a group needs" if edit.parallel else "in the best plan tried"
        for name in edit.drop:
            tell(Plan(drop=[name]), "drop", (name,), reason, best.final)
        for name in edit.linear:
            tell(edit, "linear", (name,), "in the best plan tried", best.final)
        for name, units in edit.narrow.items():
            tell(edit, "narrow", (name,), f"to {len(units)} hidden units, in the best plan tried", best.final)
    for edit in edits:
        if len(edit.names) == 1 and edit.names[0] not in best.plan.names:
            kind: Kind = "linear" if edit.linear else "narrow" if edit.narrow else "drop"
            to = "".join(f"to {len(units)} hidden units, " for units in edit.narrow.values())
            tell(edit, kind, edit.names, f"{to}others save as much for less", None)
    return tuple(sorted(made, key=lambda decision: recording.index(decision.branches[0])))
