"""The problem that solvers solve: candidates, how two of them act together, and limits on what the plan may need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Literal, TypeAlias

from fxfuse.errors import OptionError
from fxfuse.planning.candidates import Candidate
from fxfuse.planning.costs import Use

Resource: TypeAlias = Literal["seconds", "memory", "cache", "kl"]

Pair: TypeAlias = tuple[int, int]
"""The numbers of two candidates, the lower first."""


@dataclass(frozen=True)
class Limit:
    """The most that a plan may need of a resource: seconds, bytes, or predicted nats per token.

    Attributes:
        resource: of what.
        most: how much.
        name: the option that asks for it, as in messages.
        unit: what a number in a message is divided by, and its name.
    """

    resource: Resource
    most: float
    name: str
    unit: tuple[float, str] = (1.0, "")

    def shown(self, number: float) -> str:
        return f"{number / self.unit[0]:.4g}{self.unit[1]}"


@dataclass(frozen=True)
class Problem:
    """Choose among candidates.

    Attributes:
        candidates: of which no two that are taken may name one branch.
        original: what the model needs if none is taken.
        limits: what it may need.
        pairs: what two candidates cost together beyond the sum of both, nats per token.
    """

    candidates: tuple[Candidate, ...]
    original: Use
    limits: tuple[Limit, ...] = ()
    pairs: Mapping[Pair, float] = field(default_factory=dict)

    @cached_property
    def rivals(self) -> tuple[tuple[int, ...], ...]:
        """Sets of candidates of which one may be taken at most: those that name one branch."""
        named: dict[str, list[int]] = defaultdict(list)
        for number, candidate in enumerate(self.candidates):
            for name in candidate.edit.names:
                named[name].append(number)
        return tuple(dict.fromkeys(tuple(numbers) for numbers in named.values() if len(numbers) > 1))

    @cached_property
    def exclusive(self) -> frozenset[Pair]:
        """The pairs that cannot be taken together."""
        return frozenset(pair for numbers in self.rivals for pair in combinations(numbers, 2))

    def cost(self, chosen: Iterable[int]) -> float:
        """Predicted KL of a choice, nats per token."""
        taken = sorted(chosen)
        return sum(self.candidates[number].cost for number in taken) + sum(
            self.pairs.get(pair, 0.0) for pair in combinations(taken, 2)
        )

    def use(self, chosen: Iterable[int]) -> Use:
        """What the model needs under a choice."""
        return sum((Use() - self.candidates[number].gain for number in chosen), self.original)

    def allows(self, chosen: Iterable[int]) -> bool:
        """Whether a choice is one, and within all limits."""
        taken = sorted(chosen)
        if not self.exclusive.isdisjoint(combinations(taken, 2)):
            return False
        use, slack = self.use(taken), 1e-9
        needs = {"seconds": use.seconds, "memory": use.memory, "cache": use.cache, "kl": self.cost(taken)}
        return all(needs[limit.resource] <= limit.most + slack * abs(limit.most) for limit in self.limits)


@dataclass(frozen=True)
class Solution:
    """A choice.

    Attributes:
        chosen: the numbers of the candidates, ascending.
        cost: its predicted KL, nats per token.
        use: what the model then needs, predicted.
    """

    chosen: tuple[int, ...]
    cost: float
    use: Use


def solution(problem: Problem, chosen: Iterable[int]) -> Solution:
    """A choice with what it costs and needs."""
    taken = tuple(sorted(chosen))
    return Solution(taken, problem.cost(taken), problem.use(taken))


def infeasible(limit: Limit, least: float) -> OptionError:
    """What to say if no choice is within all limits.

    Args:
        limit: the tightest of them, which is furthest off, relative to what it asks for, where all are kept best.
        least: what is needed there.
    """
    return OptionError(
        f"no plan keeps to the limits: {limit.name} asks for {limit.shown(limit.most)}, and the best that these edits "
        f"reach, all limits considered, is {limit.shown(least)}, {limit.shown(least - limit.most)} too much. Allow "
        "more, or larger groups"
    )
