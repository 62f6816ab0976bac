from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse import Plan
from fxfuse.errors import OptionError, RecordError
from fxfuse.measure.recording import Recording
from fxfuse.planning import attention_scores, cheapest
from tests.planning.recordings import names_of, recording, recordings

KL = {"a0": 0.5, "a1": 0.1, "a2": 0.3, "a3": 0.2, "f0": 0.0}


def four(**options: Any) -> Recording:
    return recording("afafafaf", **({"kl": KL} | options))


class TestScores:
    @pytest.mark.parametrize(
        ("by", "expected"),
        [("kl", [0.5, 0.1, 0.3, 0.2]), ("cosine", [0.05, 0.01, 0.03, 0.02]), ("norm_ratio", [7, 5, 3, 1])],
    )
    def test_are_the_recorded_ones_of_the_attentions(self, by: Any, expected: list[float]) -> None:
        scores = attention_scores(four(), by)

        assert list(scores) == ["a0", "a1", "a2", "a3"]
        assert list(scores.values()) == pytest.approx(expected, abs=1e-6)

    def test_what_the_recorded_plan_edits_has_none(self) -> None:
        made = four(plan=Plan(drop=["a9"], parallel=[["a1", "a2"]]))
        assert list(attention_scores(made)) == ["a0", "a3"]

    def test_that_were_not_recorded_are_an_error_which_says_what_to_do(self) -> None:
        with pytest.raises(RecordError, match="no kl of some attentions: choose score='cosine'"):
            attention_scores(four(kl=math.nan))

    def test_that_do_not_exist_are_an_error_with_those_that_do(self) -> None:
        with pytest.raises(OptionError, match="no score 'cosinus'; nearest: cosine"):
            attention_scores(four(), "cosinus")  # type: ignore[arg-type]  # that is the error


class TestTheCheapest:
    @pytest.mark.parametrize(
        ("drop", "expected"),
        [(0, []), (2, ["a1", "a3"]), (0.5, ["a1", "a3"]), (0.74, ["a1", "a3"]), (1.0, ["a1", "a3", "a2", "a0"])],
    )
    def test_a_count_or_a_fraction_of_them(self, drop: int | float, expected: list[str]) -> None:
        assert list(cheapest(four(), drop)) == expected

    def test_another_score_finds_others(self) -> None:
        assert list(cheapest(four(), 2, "norm_ratio")) == ["a3", "a2"]

    @pytest.mark.parametrize(
        ("budget", "expected"), [(0.05, []), (0.1001, ["a1"]), (0.31, ["a1", "a3"]), (9, ["a1", "a3", "a2", "a0"])]
    )
    def test_as_many_as_their_scores_together_allow(self, budget: float, expected: list[str]) -> None:
        assert list(cheapest(four(), max_score=budget)) == expected
        assert list(cheapest(four(), 1, max_score=budget)) == expected[:1]

    def test_none_can_be_chosen_without_scores(self) -> None:
        assert cheapest(four(kl=math.nan), 0) == {}

    @pytest.mark.parametrize("drop", ["foo", True, -1, 5, 1.5, -0.1, math.nan, [1]])
    def test_nonsense_is_an_error(self, drop: Any) -> None:
        with pytest.raises(OptionError, match="drop"):
            cheapest(four(), drop)

    @pytest.mark.parametrize("budget", [-1, math.nan])
    def test_a_negative_budget_is_an_error(self, budget: float) -> None:
        with pytest.raises(OptionError, match="max_score"):
            cheapest(four(), max_score=budget)

    @given(recordings(), st.floats(0, 5), st.floats(0, 5))
    def test_more_budget_drops_the_same_and_more(self, made: Recording, one: float, other: float) -> None:
        less, more = (list(cheapest(made, max_score=budget)) for budget in sorted([one, other]))
        scores = attention_scores(made)

        assert more[: len(less)] == less
        assert sum(scores[name] for name in less) <= min(one, other)
        assert sorted(scores.values())[: len(more)] == [scores[name] for name in more]
        assert set(more) <= set(names_of(made, "a"))
