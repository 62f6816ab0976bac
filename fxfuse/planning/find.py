"""Find a plan that reaches targets: a pool of solutions, each measured truly, perhaps healed, bettered by exchanges.

1. Each edit is measured by itself: its KL, and its change of the logits (:mod:`fxfuse.planning.changes`). A linear map
   in an attention's place is fitted before, by itself (:mod:`fxfuse.healing.alone`), as Puzzle distils its blocks.
2. A mixed-integer program gives several different choices that reach the targets (:mod:`fxfuse.planning.solvers`).
3. Each is measured; the best are healed by a short fit and measured again, because healing changes the choice.
4. From the best one, single edits are exchanged for others, those of the least predicted cost first.

Puzzle (arXiv 2411.19146) does the first two, of single blocks, without pairs.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from fxfuse._common.bounds import check_bound, check_count
from fxfuse._common.progress import bar
from fxfuse._torch.compiled import original
from fxfuse._torch.dynamo import originals_forbidden
from fxfuse.data.batches import Batch, Model, eval_mode
from fxfuse.errors import HealError, NotFiniteError, OptionError, PlanError
from fxfuse.healing.alone import Maps, maps_alone, own_maps
from fxfuse.healing.heal import HELD_OUT, heal
from fxfuse.healing.stages import count_tokens
from fxfuse.healing.text import kinds
from fxfuse.measure.answers import Answers
from fxfuse.measure.evaluation import evaluate
from fxfuse.measure.planned import Planned
from fxfuse.measure.recording import Recording
from fxfuse.model.force import uncompiled
from fxfuse.plan import Plan
from fxfuse.planning.candidates import candidates, edits, together
from fxfuse.planning.changes import Changes, measure_changes
from fxfuse.planning.costs import Costs
from fxfuse.planning.found import Search, Trial, decisions
from fxfuse.planning.solvers import Problem, solve
from fxfuse.planning.solvers.exchange import Steps
from fxfuse.planning.state import State, healed_on
from fxfuse.planning.targets import Targets

Kinds: TypeAlias = Mapping[str, Sequence[Batch]]
"""Text to heal on, by kind."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to look.

    Attributes:
        max_group: FFNs in a group, at most.
        narrow: shares of its hidden units that an FFN may keep, such as ``(0.75, 0.5, 0.25)``; the units are those that
            the recording ranks highest. Each share is tried with each FFN, so it makes the search longer.
        pool: how many different solutions are measured.
        healed: how many of them, the best, are healed.
        patience: after how many exchanges that better nothing the search ends.
        minutes: after which no new exchange begins; None has no such limit.
        heal_tokens: how many tokens of each kind of text a plan is healed on here, at least; it takes whole batches.

    Raises:
        OptionError: a number out of range.
    """

    max_group: int = 4
    narrow: tuple[float, ...] = ()
    pool: int = 6
    healed: int = 3
    patience: int = 6
    minutes: float | None = None
    heal_tokens: int = 8192

    def __post_init__(self) -> None:
        for name in ("max_group", "pool", "healed", "heal_tokens"):
            check_count(name, getattr(self, name))
        if not isinstance(self.patience, int) or self.patience < 0:
            raise OptionError(f"patience is a number of exchanges, 0 or more, not {self.patience!r}")
        check_bound("minutes", self.minutes, "a time")


def find_plan(
    recording: Recording,
    model: nn.Module,
    batches: Iterable[Batch],
    targets: Targets,
    costs: Costs,
    *,
    heal_on: Kinds | None = None,
    effort: Effort = Effort(),
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Search:
    """The plan of the least KL, as measured, that reaches ``targets``.

    Args:
        recording: of the model.
        model: the recorded model, with the same weights. It is left as it is, compiled or not.
        batches: what to measure on: keyword arguments of the model's calls. All of them are kept in memory, and what
            the model says to them (:class:`fxfuse.measure.answers.Answers`).
        targets: what to reach.
        costs: of the branches (:func:`fxfuse.planning.costs.measure_costs`).
        heal_on: text to heal the best plans on, as :func:`fxfuse.heal` takes it; then linear maps are edits, too, which
            are fitted on it before they are measured, and the KL that counts is that of the healed model.
        effort: how long to look.
        resume: a file that keeps what was measured; an interrupted search goes on from it. Remove it when done.
        progress: show on stderr how far it is.

    Raises:
        OptionError: no plan reaches the targets; the message names the tightest, and how far off it is.
        RecordError: the recording is of another model, the model cannot be evaluated, or a state of something else.
        PlanError: no solution was found in time.
    """
    if not targets:
        raise OptionError("give a target: target_latency=0.8, max_memory or max_kv_bytes (bytes)")
    own = original(model)
    recording.check(own)
    given = list(batches)
    short = {kind: _first(text, effort.heal_tokens) for kind, text in (heal_on or {}).items()}
    state = State(resume, recording.model, given, healed_on(short))
    started = time.monotonic()
    with eval_mode(own), uncompiled(own), originals_forbidden():
        search = _Searching(recording, own, given, short, state, progress)
        wanted = edits(recording, costs, max_group=effort.max_group, linear=bool(short), narrow=effort.narrow)
        search.fit([edit for edit in wanted if edit.linear])
        changes = search.changes(wanted)
        problem = Problem(
            candidates(costs, changes.kl), costs.of(recording.plan), targets.limits(costs), changes.pairs()
        )
        trials = search.pool(problem, effort)
        search.better(problem, trials, effort, started)
    order = sorted(trials.values(), key=lambda trial: trial.final)
    best = order[0]
    if targets.kl is not None and best.final > targets.kl:
        raise OptionError(
            f"max_kl asks for {targets.kl:.4g} nats per token, and the best of the {len(order)} plans that were tried "
            f"costs {best.final:.4g}, {best.final - targets.kl:.4g} too much: allow more, or ask to save less"
        )
    why = (*recording.plan.why, *decisions(recording, costs, changes.kl, best))
    return Search(best.plan.model_copy(update={"why": why}), tuple(order), changes.kl, costs)


def _first(text: Iterable[Batch], tokens: int) -> Sequence[Batch]:
    """As many batches as hold ``tokens``, and at least two, because one is held out."""
    taken, count = list[Batch](), 0
    for batch in text:
        if count >= tokens and len(taken) > 1:
            break
        taken.append(batch)
        count += count_tokens(batch)
    return taken


Choice: TypeAlias = tuple[int, ...]
"""The numbers of candidates, ascending."""


class _Searching:
    """What a search measures with, and on; the model is in eval mode."""

    def __init__(
        self,
        recording: Recording,
        model: nn.Module,
        batches: Sequence[Batch],
        heal_on: Kinds,
        state: State,
        progress: bool,
    ) -> None:
        self._recording, self._model, self._batches = recording, model, batches
        self._heal_on, self._state, self._progress = heal_on, state, progress
        self._text = healed_on(heal_on)
        self._answers = Answers(model)
        self._maps: Maps = {}
        self._planned = Planned(model)

    def fit(self, wanted: Sequence[Plan]) -> None:
        """Fit the linear maps of these edits, each by itself."""
        if wanted:
            plan = together(self._recording, wanted)
            self._maps = maps_alone(self._model, plan, kinds(self._heal_on, HELD_OUT, list), progress=self._progress)
            self._planned = Planned(self._model, own_maps(self._maps))

    def changes(self, wanted: Sequence[Plan]) -> Changes:
        """What each edit does by itself, to the model as it was recorded."""

        def planned(edit: Plan) -> Planned:
            return self._under(together(self._recording, [edit]))

        known = {edit: kl for edit, kl in self._state.changes.kl.items() if edit in set(wanted)}
        rows = [row for row, edit in enumerate(self._state.changes.kl) if edit in known]
        before = Changes(known, self._state.changes.vectors[rows]) if rows else Changes.empty()
        base = self._base()
        made = measure_changes(wanted, planned, base, self._batches, before, self._state.keep_changes, self._progress)
        self._state.flush()
        return made

    def _base(self) -> Model:
        """The model as it was recorded, apart from the one whose plan changes."""
        if not self._recording.plan:
            return self._answers
        made = Planned(self._model)
        made.plan = self._recording.plan
        return made

    def pool(self, problem: Problem, effort: Effort) -> dict[Choice, Trial]:
        """Different solutions, measured, the best of them healed."""
        solutions = solve(problem, effort.pool)
        trials: dict[Choice, Trial] = {}
        with bar("measuring plans", "plans", len(solutions), self._progress) as advance:
            for each in solutions:
                trials[each.chosen] = self._trial(problem, each.chosen, "pool")
                advance(1)
        best = sorted(trials, key=lambda choice: trials[choice].kl)[: effort.healed]
        with bar("healing plans", "plans", len(best), self._progress and bool(self._heal_on)) as advance:
            for choice in best if self._heal_on else ():
                trials[choice] = self._healed(trials[choice])
                advance(1)
        return self._comparable(trials)

    def _comparable(self, trials: dict[Choice, Trial]) -> dict[Choice, Trial]:
        """Those that were healed, if any were: an unhealed KL says too little beside a healed one."""
        healed = {choice: trial for choice, trial in trials.items() if trial.healed is not None}
        return healed or trials

    def better(self, problem: Problem, trials: dict[Choice, Trial], effort: Effort, started: float) -> None:
        """Exchange single edits of the best plan for others, as long as that helps and there is time."""
        steps, tried, failures = Steps.of(problem), set(trials), 0
        with bar("exchanging edits", "plans", None, self._progress) as advance:
            while failures < effort.patience:
                if effort.minutes is not None and time.monotonic() - started > 60 * effort.minutes:
                    return
                best = min(trials, key=lambda choice: trials[choice].final)
                new = next((choice for _, choice in steps.neighbours(best) if choice not in tried), None)
                if new is None:
                    return
                tried.add(new)
                trial = self._trial(problem, new, "exchange")
                if self._heal_on and trial.kl < trials[best].kl * 1.25:
                    trial = self._healed(trial)
                comparable = (trial.healed is None) == (trials[best].healed is None)
                failures = 0 if comparable and trial.final < trials[best].final else failures + 1
                if comparable:
                    trials[new] = trial
                advance(1)

    def _trial(self, problem: Problem, choice: Choice, step: str) -> Trial:
        plan = together(self._recording, (problem.candidates[number].edit for number in choice))
        fitted = f" with maps of {self._text}" if self._maps.keys() & set(plan.linear) else ""
        kl = self._known(f"{plan.digest}{fitted}", lambda: self._kl(self._under(plan)))
        return Trial(plan, problem.cost(choice), kl, None, problem.use(choice), step)

    def _healed(self, trial: Trial) -> Trial:
        if not trial.plan or trial.kl == float("inf"):
            return trial
        kl = self._known(f"{trial.plan.digest} healed on {self._text}", lambda: self._after_healing(trial.plan))
        return Trial(trial.plan, trial.predicted, trial.kl, kl, trial.use, trial.step)

    def _after_healing(self, plan: Plan) -> float:
        student = copy.deepcopy(self._model)
        try:
            heal(student, plan, self._heal_on, "fit", progress=self._progress)
        except HealError:  # nothing in it that can be fitted: it stays as it is
            return self._kl(self._under(plan))
        healed = Planned(student)
        healed.plan = plan
        return self._kl(healed)

    def _known(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self._state.kl:
            self._state.keep_kl(key, measure())
        return self._state.kl[key]

    def _under(self, plan: Plan) -> Planned:
        self._planned.plan = plan
        self._planned.weights = {k: value for name in plan.linear for k, value in self._maps.get(name, {}).items()}
        return self._planned

    def _kl(self, planned: Planned) -> float:
        """KL to the original on all batches, nats per token; infinity of what cannot be applied or makes NaN."""
        try:
            found = evaluate(planned, self._batches, reference=self._answers, progress=self._progress).kl
        except (PlanError, NotFiniteError):
            return float("inf")
        assert found is not None  # there is a reference
        return found
