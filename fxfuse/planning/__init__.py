"""From a recording to a plan: what to drop, what to make parallel, and what that costs.

=============  ======================================================================
``scores``     which attention is cheap to lose
``groups``     which FFNs follow each other, and how to part them into groups
``blocks``     which whole blocks may run in parallel (arXiv 2503.18908, appendix B)
``decisions``  the plan that follows from what became of each edit
``budget``     which edits fit within a budget
``make``       ``make_plan``, which puts these together
``meter``      what a plan costs: the KL of the planned model
=============  ======================================================================

All but the last two are functions of a recording and of numbers.
"""

from fxfuse.plan import Decision
from fxfuse.planning.blocks import block_windows
from fxfuse.planning.budget import search
from fxfuse.planning.decisions import plan_of, propose
from fxfuse.planning.groups import Limits, propose_groups, runs
from fxfuse.planning.make import Choices, decide, make_plan
from fxfuse.planning.meter import Meter
from fxfuse.planning.scores import attention_scores, cheapest

__all__ = [
    "Choices",
    "Decision",
    "Limits",
    "Meter",
    "attention_scores",
    "block_windows",
    "cheapest",
    "decide",
    "make_plan",
    "plan_of",
    "propose",
    "propose_groups",
    "runs",
    "search",
]
