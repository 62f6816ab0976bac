"""A choice bettered by single steps: a candidate left out, added, or taken for another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fxfuse.planning.solvers.problem import Problem

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """The steps of a problem, and what they cost; of n candidates it holds two matrices ``[n, n]``."""

    problem: Problem
    costs: Array
    terms: Array
    """``[n, n]``, symmetric: the pairs' terms."""
    rivals: NDArray[np.bool_]
    """``[n, n]``: whether two cannot be taken together."""
    gains: Array
    """``[n, 3]``: seconds, memory, cache."""

    @classmethod
    def of(cls, problem: Problem) -> Steps:
        """The steps of ``problem``."""
        n = len(problem.candidates)
        terms, rivals = np.zeros((n, n)), np.zeros((n, n), dtype=bool)
        for (one, other), term in problem.pairs.items():
            terms[one, other] = terms[other, one] = term
        for one, other in problem.exclusive:
            rivals[one, other] = rivals[other, one] = True
        gains = [(c.gain.seconds, c.gain.memory, c.gain.cache) for c in problem.candidates]
        costs = np.array([candidate.cost for candidate in problem.candidates])
        return cls(problem, costs, terms, rivals, np.array(gains).reshape(n, 3))

    def neighbours(self, chosen: Sequence[int]) -> list[tuple[float, tuple[int, ...]]]:
        """All choices one step from ``chosen`` that are within the limits, and their predicted costs, cheapest first.

        A step leaves one candidate out, adds one that goes with all others, or does both at once.
        """
        made: list[tuple[float, tuple[int, ...]]] = []
        for left, cost, costs in self._steps(chosen):
            made += [(cost, left)] if cost < np.inf else []
            made += [(float(costs[new]), _with(left, int(new))) for new in np.flatnonzero(costs < np.inf)]
        return sorted(made)

    def best(self, chosen: Sequence[int], others: Sequence[Sequence[int]] = (), distance: int = 1) -> tuple[int, ...]:
        """``chosen``, bettered by steps that lessen the predicted cost, until there is none.

        The result differs from each of ``others`` in ``distance`` candidates at least.
        """
        best, cost = tuple(sorted(chosen)), self._cost(chosen)
        while True:
            start = cost - 1e-9 * max(1.0, abs(cost))
            least, made = start, best
            for left, alone, costs in self._steps(best):
                if alone < least and _differs(left, others, distance):
                    least, made = alone, left
                for new in np.argsort(costs):
                    if costs[new] >= least:
                        break
                    if _differs(_with(left, int(new)), others, distance):
                        least, made = float(costs[new]), _with(left, int(new))
            if least >= start:
                return best
            best, cost = made, least

    def _steps(self, chosen: Sequence[int]) -> Iterator[tuple[tuple[int, ...], float, Array]]:
        """``chosen`` as it is, and less one: what is left, its cost, and for each candidate the cost with that added.

        What is no step, or is not within the limits, costs infinity.
        """
        taken = tuple(sorted(chosen))
        original = self.problem.original
        needs = np.array([original.seconds, original.memory, original.cache]) - self.gains[list(taken)].sum(0)
        cost, near = self._cost(taken), self.terms[:, list(taken)].sum(1)
        rivals = self.rivals[:, list(taken)].sum(1)
        for out in (None, *taken):
            # What is left without ``out``: all sums less what is its own.
            own = 0.0 if out is None else float(self.costs[out] + near[out])
            apart = near if out is None else near - self.terms[:, out]
            needed = needs if out is None else needs + self.gains[out]
            costs = cost - own + self.costs + apart
            free = (rivals if out is None else rivals - self.rivals[:, out]) == 0
            free[list(taken)] = False
            free &= self._within(needed - self.gains, costs)
            possible = out is not None and bool(self._within(needed[None], np.array([cost - own]))[0])
            left = tuple(number for number in taken if number != out)
            yield left, cost - own if possible else np.inf, np.where(free, costs, np.inf)

    def _within(self, needs: Array, costs: Array) -> NDArray[np.bool_]:
        """Whether choices of these needs ``[choices, 3]`` and costs ``[choices]`` are within the limits."""
        within = np.ones(len(costs), dtype=bool)
        for limit in self.problem.limits:
            needed = costs if limit.resource == "kl" else needs[:, ("seconds", "memory", "cache").index(limit.resource)]
            within = within & (needed <= limit.most + 1e-9 * abs(limit.most))
        return within

    def _cost(self, chosen: Sequence[int]) -> float:
        numbers = list(chosen)
        return float(self.costs[numbers].sum() + self.terms[np.ix_(numbers, numbers)].sum() / 2)


def _with(left: tuple[int, ...], new: int) -> tuple[int, ...]:
    return tuple(sorted((*left, new)))


def _differs(made: Sequence[int], others: Sequence[Sequence[int]], distance: int) -> bool:
    return all(len(set(made) ^ set(other)) >= distance for other in others)
