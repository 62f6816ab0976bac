"""Solvers: which candidates to take.

===========  =========================================================================
``problem``  candidates, how they act together, and what a plan may need
``mip``      the best plans as a mixed-integer program, several of them, each different
``exchange`` a plan bettered by taking one candidate for another
``ladders``  rules from the literature: plans in order, each saving more than the last
===========  =========================================================================

All are functions of values; none calls a model.
"""

from fxfuse.planning.solvers.ladders import LADDERS, Ladder, first_within
from fxfuse.planning.solvers.mip import solve
from fxfuse.planning.solvers.problem import Limit, Problem, Solution

__all__ = ["LADDERS", "Ladder", "Limit", "Problem", "Solution", "first_within", "solve"]
