from __future__ import annotations

import time
from itertools import chain, combinations
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse import Plan
from fxfuse.errors import OptionError
from fxfuse.planning.candidates import Candidate
from fxfuse.planning.costs import Use
from fxfuse.planning.solvers import Limit, Problem, solve
from fxfuse.planning.solvers.exchange import Steps
from tests.planning.solvers.problems import large, problems


def choices(problem: Problem) -> list[tuple[int, ...]]:
    """All choices that are within the limits, by trying every one."""
    numbers = range(len(problem.candidates))
    every = chain.from_iterable(combinations(numbers, size) for size in range(len(problem.candidates) + 1))
    found = []
    for choice in every:
        names = [name for number in choice for name in problem.candidates[number].edit.names]
        taken = [problem.candidates[number] for number in choice]
        needs = {
            "seconds": problem.original.seconds - sum(c.gain.seconds for c in taken),
            "memory": problem.original.memory - sum(c.gain.memory for c in taken),
            "cache": problem.original.cache - sum(c.gain.cache for c in taken),
            "kl": cost(problem, choice),
        }
        if len(set(names)) == len(names) and all(needs[each.resource] <= each.most for each in problem.limits):
            found.append(choice)
    return found


def cost(problem: Problem, choice: tuple[int, ...]) -> float:
    alone = sum(problem.candidates[number].cost for number in choice)
    return alone + sum(problem.pairs.get(pair, 0.0) for pair in combinations(choice, 2))


def in_units(problem: Problem, unit: float) -> Problem:
    """The same problem, with all its numbers multiplied."""

    def use(given: Use) -> Use:
        return Use(given.seconds * unit, given.memory * unit, given.cache * unit)

    made = tuple(Candidate(c.edit, c.cost * unit, use(c.gain)) for c in problem.candidates)
    limits = tuple(Limit(each.resource, each.most * unit, each.name) for each in problem.limits)
    pairs = {pair: term * unit for pair, term in problem.pairs.items()}
    return Problem(made, use(problem.original), limits, pairs)


class TestAgainstEveryChoice:
    @given(problems())
    def test_the_best_is_found_or_none_is_possible(self, problem: Problem) -> None:
        possible = choices(problem)
        if not possible:
            with pytest.raises(OptionError, match="no plan keeps to the limits"):
                solve(problem, gap=0.0)
            return
        (best,) = solve(problem, gap=0.0, nodes=10**6)
        assert best.chosen in possible
        assert best.cost == pytest.approx(min(cost(problem, choice) for choice in possible), abs=1e-6)
        assert best.cost == pytest.approx(cost(problem, best.chosen), abs=1e-9)

    @given(problems(7))
    def test_the_program_alone_finds_it(self, problem: Problem) -> None:
        if possible := choices(problem):
            with mock.patch.object(Steps, "best", lambda self, made, *others: made):
                (best,) = solve(problem, gap=0.0, nodes=10**6)
            assert best.cost == pytest.approx(min(cost(problem, choice) for choice in possible), abs=1e-6)

    @given(problems(7), st.sampled_from((1e-6, 1e9)))
    def test_in_other_units_it_is_the_same(self, problem: Problem, unit: float) -> None:
        """Of a branch that takes 1e-6 seconds, or 1e9 bytes: a solver's tolerances know no units."""
        scaled = in_units(problem, unit)
        if not choices(problem):
            with pytest.raises(OptionError, match="no plan keeps to the limits"):
                solve(scaled)
        else:
            (best,), (other,) = (solve(each, gap=0.0, nodes=10**6) for each in (problem, scaled))
            assert other.cost == pytest.approx(best.cost * unit, rel=1e-6, abs=1e-9 * unit)

    @given(problems(7))
    def test_the_pool_is_the_best_of_what_differs_from_those_before(self, problem: Problem) -> None:
        possible = choices(problem)
        if not possible:
            return
        pool = solve(problem, 4, distance=2, gap=0.0, nodes=10**6)
        for one, other in combinations(pool, 2):
            assert len(set(one.chosen) ^ set(other.chosen)) >= 2
        assert [s.cost for s in pool] == sorted(s.cost for s in pool)
        left = [c for c in possible if all(len(set(c) ^ set(s.chosen)) >= 2 for s in pool)]
        assert len(pool) == 4 or not left

    @given(problems(7))
    def test_a_step_is_one_and_the_cheapest_come_first(self, problem: Problem) -> None:
        possible = set(choices(problem))
        for chosen in list(possible)[:3]:
            near = Steps.of(problem).neighbours(chosen)
            expected = {c for c in possible if c != chosen and _one_step(chosen, c)}
            assert {made for _, made in near} == expected
            assert all(value == pytest.approx(cost(problem, made), abs=1e-9) for value, made in near)


def _one_step(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(set(one) - set(other)) <= 1 and len(set(other) - set(one)) <= 1


class TestInfeasible:
    def problem(self, *limits: Limit) -> Problem:
        made = tuple(Candidate(Plan(drop=[name]), 1.0, Use(0.1, 100.0, 10.0)) for name in "abc")
        return Problem(made, Use(1.0, 1000.0, 50.0), limits)

    def test_the_limit_that_cannot_be_kept_is_named_and_how_far_off_it_is(self) -> None:
        limits = (
            Limit("seconds", 0.5, "target_latency", (1.0, " of the original")),
            Limit("cache", 40.0, "max_kv_bytes"),
        )
        with pytest.raises(OptionError, match=r"target_latency asks for 0\.5 .* is 0\.7 .*, 0\.2 .* too much") as e:
            solve(self.problem(*limits))
        assert "max_kv_bytes" not in str(e.value)

    def test_of_two_that_exclude_each_other_it_is_the_one_further_off(self) -> None:
        """One drop is 0.29 of the limit above the first and within the second; two are 0.33 above the second."""
        limits = Limit("seconds", 0.7, "target_latency"), Limit("kl", 1.5, "max_kl")
        with pytest.raises(OptionError, match=r"target_latency asks for 0\.7, .* is 0\.9, 0\.2 too much"):
            solve(self.problem(*limits))


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_126_layers_are_planned_in_seconds(share: float) -> None:
    problem = large(126, share)
    started = time.process_time()
    pool = solve(problem, 4)
    assert time.process_time() - started < 10
    assert len(pool) == 4
    for found in pool:
        assert problem.allows(found.chosen)
