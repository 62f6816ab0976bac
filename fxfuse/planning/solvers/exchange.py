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
            made += [(float(costs[new]), _with(left, new)) for new in np.flatnonzero(costs < np.inf)]
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
                    if _differs(_with(left, new), others, distance):
                        least, made = float(costs[new]), _with(left, new)
            if least >= start:
                return best
            best, cost = made, least

    def _steps(self, chosen: Sequence[int]) -> Iterator[tuple[tuple[int, ...], float, Array]]:
        """``chosen`` as it is, and less one: what is left, its cost, and for each candidate the cost with that added.

        What is no step, or is not within the limits, costs infinity.
        """
        taken = tuple(sorted(chosen))
        for out in (None, *taken):
            left = tuple(number for number in taken if number != out)
            cost = self._cost(left)
            costs = cost + self.costs + self.terms[:, left].sum(1)
            free = self._within(left, costs) & ~np.any(self.rivals[:, left], axis=1)
            free[list(taken)] = False
            possible = out is not None and self.problem.allows(left)
            yield left, cost if possible else np.inf, np.where(free, costs, np.inf)

    def _cost(self, chosen: Sequence[int]) -> float:
        numbers = list(chosen)
        return float(self.costs[numbers].sum() + self.terms[np.ix_(numbers, numbers)].sum() / 2)

    def _within(self, left: Sequence[int], costs: Array) -> NDArray[np.bool_]:
        """Whether ``left`` with each further candidate is within the limits."""
        use = self.problem.use(left)
        needs = dict(zip(("seconds", "memory", "cache"), (use.seconds, use.memory, use.cache), strict=True))
        within = np.ones(len(costs), dtype=bool)
        for limit in self.problem.limits:
            if limit.resource == "kl":
                needed = costs
            else:
                column = ("seconds", "memory", "cache").index(limit.resource)
                needed = needs[limit.resource] - self.gains[:, column]
            within &= needed <= limit.most + 1e-9 * abs(limit.most)
        return within


def _with(left: tuple[int, ...], new: int) -> tuple[int, ...]:
    return tuple(sorted((*left, int(new))))


def _differs(made: Sequence[int], others: Sequence[Sequence[int]], distance: int) -> bool:
    return all(len(set(made) ^ set(other)) >= distance for other in others)
