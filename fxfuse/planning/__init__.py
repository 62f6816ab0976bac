"""From a recording to a plan: what to drop, what to make parallel, and what that costs.

Within a budget of KL, edit by edit:

=============  ======================================================================
``scores``     which attention is cheap to lose
``groups``     which FFNs follow each other, and how to part them into groups
``blocks``     which whole blocks may run in parallel (arXiv 2503.18908, appendix B)
``decisions``  the plan that follows from what became of each edit
``budget``     which edits fit within a budget
``make``       ``make_plan``, which puts these together
``meter``      what a plan costs: the KL of the planned model
=============  ======================================================================

All but the last two are functions of a recording and of numbers. For a target of time or memory:

==============  =====================================================================
``targets``     what a plan is to reach
``costs``       what the branches cost, and so what a plan saves
``candidates``  the edits that there are
``changes``     what each does by itself, and so what two do together
``solvers``     which of them to take
``find``        ``find_plan``, which measures what solvers propose, heals and betters it
``lead``        the same by what was recorded alone
``found``       all that was tried
``state``       what was measured, as a file
==============  =====================================================================
"""

from fxfuse.plan import Decision
from fxfuse.planning.blocks import block_windows
from fxfuse.planning.budget import search
from fxfuse.planning.costs import Costs, measure_costs
from fxfuse.planning.decisions import plan_of, propose
from fxfuse.planning.find import Effort, find_plan
from fxfuse.planning.found import Search, Trial
from fxfuse.planning.groups import Limits, propose_groups, runs
from fxfuse.planning.make import Choices, decide, make_plan
from fxfuse.planning.meter import Meter
from fxfuse.planning.scores import attention_scores, cheapest
from fxfuse.planning.targets import Targets

__all__ = [
    "Choices",
    "Costs",
    "Decision",
    "Effort",
    "Limits",
    "Meter",
    "Search",
    "Targets",
    "Trial",
    "attention_scores",
    "block_windows",
    "cheapest",
    "decide",
    "find_plan",
    "make_plan",
    "measure_costs",
    "plan_of",
    "propose",
    "propose_groups",
    "runs",
    "search",
]
