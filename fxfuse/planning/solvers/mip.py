"""Plans as a mixed-integer program, solved by HiGHS: least predicted KL within limits, several different solutions.

A variable for each candidate, so one for each interval of FFNs; products of two variables, which pairwise terms take
(arXiv 2602.00161), are made linear: ``y <= a``, ``y <= b``, ``y >= a + b - 1``. Puzzle (arXiv 2411.19146) solves the
same without pairs. After each solution a cut keeps the next ones at a Hamming distance from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from fxfuse._common.bounds import check_count
from fxfuse.errors import PlanError
from fxfuse.planning.solvers.exchange import Steps
from fxfuse.planning.solvers.problem import Limit, Pair, Problem, Solution, infeasible, solution

GAP = 0.02
"""Relative distance from the optimum at which the solver stops: predictions are not that good."""

NODES = 100
"""Nodes of the search tree for each solution: a limit that a busy machine does not move, as it does one of time."""

PAIRS = 150
"""How many pairs the program has. Steps from its solution to others (:mod:`.exchange`) and comparisons know all."""


def solve(
    problem: Problem,
    count: int = 1,
    *,
    distance: int = 2,
    seconds: float = 120.0,
    nodes: int = NODES,
    gap: float = GAP,
    most_pairs: int = PAIRS,
) -> tuple[Solution, ...]:
    """The ``count`` best choices, the best first; fewer if there are no more.

    Args:
        problem: what to choose among.
        count: of solutions.
        distance: in how many candidates any two of them differ, at least.
        seconds: for all of them together.
        nodes: of the search tree for each of them. A solution that is not proved the best by then is taken as it is.
        gap: relative distance from the optimum at which the search for one ends.
        most_pairs: so many of the pairs are in the program, those of the candidates likeliest to be taken.

    Raises:
        OptionError: no choice is within the limits; the message names the tightest of them, and how far off it is.
        PlanError: within that not one solution was found.
    """
    check_count("count", count)
    program, steps = _Program.of(problem, most_pairs), Steps.of(problem)
    found: list[Solution] = []
    while (
        len(found) < count and (made := program.best(found, distance, _Effort(seconds / count, nodes, gap))) is not None
    ):
        others = [other.chosen for other in found]
        found.append(solution(problem, steps.best(made, others, distance)))
    if not found:
        raise infeasible(*_tightest(program))
    return tuple(sorted(found, key=lambda each: each.cost))


@dataclass(frozen=True)
class _Effort:
    """Where the search for one solution ends."""

    seconds: float
    nodes: int
    gap: float


@dataclass(frozen=True)
class _Program:
    """The arrays of a problem: columns are its candidates, then its pairs.

    All are in units that make their entries 1 at most, about: the solver's tolerances are absolute, 1e-6, and a branch
    takes 1e-5 seconds, or 1e9 bytes.
    """

    problem: Problem
    pairs: tuple[Pair, ...]
    objective: NDArray[np.float64]
    structure: LinearConstraint
    limits: tuple[tuple[Limit, NDArray[np.float64], float], ...]
    """Of each limit its row, and what the row's product with a solution may be, in its unit."""

    @classmethod
    def of(cls, problem: Problem, most_pairs: int) -> _Program:
        pairs = _likely(problem, most_pairs)
        n, width = len(problem.candidates), len(problem.candidates) + len(pairs)
        terms = [problem.pairs[pair] for pair in pairs]
        costs = np.array([*(candidate.cost for candidate in problem.candidates), *terms])
        objective = costs / (np.abs(costs).max(initial=0.0) or 1.0)
        entries: list[tuple[int, int, float]] = []
        most: list[float] = []
        for numbers in problem.rivals:
            entries += [(len(most), number, 1.0) for number in numbers]
            most.append(1.0)
        for column, (pair, term) in enumerate(zip(pairs, terms, strict=True), n):
            if term > 0:  # minimised, the product is as small as it may be
                entries += [(len(most), pair[0], 1.0), (len(most), pair[1], 1.0), (len(most), column, -1.0)]
                most.append(1.0)
            else:
                for number in pair:
                    entries += [(len(most), column, 1.0), (len(most), number, -1.0)]
                    most.append(0.0)
        rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
        matrix = csr_array((values, (rows, columns)), shape=(len(most), width))
        structure = LinearConstraint(matrix, -np.inf, np.array(most))
        return cls(problem, pairs, objective, structure, tuple(_rows(problem, costs)))

    def best(self, found: Sequence[Solution], distance: int, effort: _Effort) -> tuple[int, ...] | None:
        """The best choice that differs enough from those found; None if there is none.

        Raises:
            PlanError: the effort was too small to find any.
        """
        constraints = [self.structure, *(LinearConstraint(row, -np.inf, most) for _, row, most in self.limits)]
        constraints += [self._away_from(each.chosen, distance) for each in found]
        made = milp(
            self.objective,
            integrality=self._integrality(),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"time_limit": effort.seconds, "node_limit": effort.nodes, "mip_rel_gap": effort.gap},
        )
        if made.x is not None:
            return self._chosen(made.x)
        if made.status == 1:
            raise PlanError(
                f"no plan was found in {effort.seconds:.3g} s and {effort.nodes} nodes: allow more, or fewer pairs"
            )
        return None

    def least_excess(self) -> NDArray[np.float64]:
        """The choice whose largest relative excess over a limit is least."""
        width = len(self.objective)
        rows = [
            np.append(row, -_scale(self.problem, limit) / _unit(self.problem, limit)) for limit, row, _ in self.limits
        ]
        most = [bound for _, _, bound in self.limits]
        structure = csr_array(self.structure.A)
        structure.resize((structure.shape[0], width + 1))
        matrix = vstack([structure, csr_array(np.array(rows))])
        made = milp(
            np.append(np.zeros(width), 1.0),
            integrality=np.append(self._integrality(), 0),
            bounds=Bounds(0, np.append(np.ones(width), np.inf)),
            constraints=LinearConstraint(matrix, -np.inf, np.append(self.structure.ub, most)),
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
        assert made.x is not None  # to choose nothing exceeds limits, and is a choice
        return np.asarray(made.x[:-1])

    def _integrality(self) -> NDArray[np.int64]:
        n = len(self.problem.candidates)
        return np.array([1] * n + [0] * len(self.pairs))

    def _chosen(self, x: NDArray[np.float64]) -> tuple[int, ...]:
        return tuple(int(number) for number in np.flatnonzero(x[: len(self.problem.candidates)] > 0.5))

    def _away_from(self, chosen: Sequence[int], distance: int) -> LinearConstraint:
        """Hamming distance: those left out and those added are ``distance`` at least."""
        row = np.zeros(len(self.objective))
        row[: len(self.problem.candidates)] = 1.0
        row[list(chosen)] = -1.0
        return LinearConstraint(row, distance - len(chosen), np.inf)


def _likely(problem: Problem, most: int) -> tuple[Pair, ...]:
    """Up to ``most`` pairs that have terms: those of the candidates that cost least for what they save."""
    limited = [limit.resource for limit in problem.limits if limit.resource != "kl"]

    def price(number: int) -> float:
        candidate = problem.candidates[number]
        shares = [getattr(candidate.gain, each) / max(getattr(problem.original, each), 1e-12) for each in limited]
        return candidate.cost / max([*shares, 1e-12]) if shares else candidate.cost

    rank = {number: place for place, number in enumerate(sorted(range(len(problem.candidates)), key=price))}
    wanted = [pair for pair, term in problem.pairs.items() if term and pair not in problem.exclusive]
    wanted.sort(key=lambda pair: max(rank[pair[0]], rank[pair[1]]))
    return tuple(wanted[:most])


def _rows(problem: Problem, costs: NDArray[np.float64]) -> list[tuple[Limit, NDArray[np.float64], float]]:
    """Each limit as a row that a solution's product with may not exceed a number, in the limit's unit."""
    made: list[tuple[Limit, NDArray[np.float64], float]] = []
    for limit in problem.limits:
        unit = _unit(problem, limit)
        if limit.resource == "kl":
            made.append((limit, costs / unit, limit.most / unit))
            continue
        row = np.zeros(len(costs))
        row[: len(problem.candidates)] = [-getattr(c.gain, limit.resource) / unit for c in problem.candidates]
        made.append((limit, row, (limit.most - _original(problem, limit)) / unit))
    return made


def _original(problem: Problem, limit: Limit) -> float:
    """What the model needs of a resource without edits."""
    return 0.0 if limit.resource == "kl" else float(getattr(problem.original, limit.resource))


def _unit(problem: Problem, limit: Limit) -> float:
    """What entries of a limit's row are a part of."""
    return max(_original(problem, limit), abs(limit.most)) or 1.0


def _scale(problem: Problem, limit: Limit) -> float:
    """What an excess over a limit is compared with; the limit, but a limit of nothing excuses nothing."""
    return max(abs(limit.most), 1e-3 * _unit(problem, limit))


def _tightest(program: _Program) -> tuple[Limit, float]:
    """The limit that is furthest off where all are kept as well as may be, and what is needed of it there."""
    x, problem = program.least_excess(), program.problem
    excess = [
        (limit, limit.most + (float(row @ x) - most) * _unit(problem, limit)) for limit, row, most in program.limits
    ]
    return max(excess, key=lambda limit_and_need: _excess(problem, *limit_and_need))


def _excess(problem: Problem, limit: Limit, need: float) -> float:
    return (need - limit.most) / _scale(problem, limit)
