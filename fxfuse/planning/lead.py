"""A plan that reaches targets by what was recorded alone: a lead, of which nothing was measured."""

from __future__ import annotations

from fxfuse.errors import RecordError
from fxfuse.measure.recording import Recording
from fxfuse.plan import Plan
from fxfuse.planning.candidates import candidates, edits, together
from fxfuse.planning.changes import recorded_costs, recorded_pairs
from fxfuse.planning.costs import Costs
from fxfuse.planning.solvers import Problem, solve
from fxfuse.planning.targets import Targets


def lead(recording: Recording, targets: Targets, costs: Costs, max_group: int = 4) -> Plan:
    """The plan of the least KL that reaches ``targets``, predicted from recorded KLs and distances.

    Raises:
        OptionError: none reaches them; the message names the tightest.
        RecordError: the recording has no KLs: the recorded model returned no logits.
    """
    if bool(recording.kl.isnan().any()):
        raise RecordError("this recording has no kl of some branches: record a model that returns logits")
    kl = recorded_costs(recording, edits(recording, costs, max_group=max_group))
    pairs = recorded_pairs(recording, kl)
    problem = Problem(candidates(costs, kl), costs.of(recording.plan), targets.limits(costs), pairs)
    (best,) = solve(problem)
    return together(recording, (problem.candidates[number].edit for number in best.chosen))
