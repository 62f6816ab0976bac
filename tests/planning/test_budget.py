from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse import Plan
from fxfuse.errors import NotFiniteError, PlanError
from fxfuse.measure.recording import Recording
from fxfuse.planning import Decision, Limits, cheapest, plan_of, propose, search
from tests.planning.recordings import names_of, recording, recordings

FREE = Limits()


class Ledger:
    """A cost that adds up: of each drop, and of each group by name or else ``step`` for each step that it saves."""

    def __init__(self, drops: Mapping[str, float] = {}, groups: Mapping[str, float] = {}, step: float = 0.0) -> None:
        self._drops, self._groups, self._step = drops, groups, step
        self.asked: list[Plan] = []

    def __call__(self, plan: Plan) -> float:
        self.asked.append(plan)
        groups = ["".join(map(str, group)) for group in plan.parallel]
        steps = [self._step * (len(group) - 1) for group in plan.parallel]
        return sum(self._drops.get(name, 0.0) for name in plan.drop) + sum(
            self._groups.get(group, step) for group, step in zip(groups, steps, strict=True)
        )


def outcome(decisions: list[Decision]) -> list[tuple[str, str]]:
    return [("".join(decision.branches), decision.outcome) for decision in decisions]


def run(made: Recording, cost: Callable[[Plan], float], max_kl: float, **options: Any) -> list[Decision]:
    return search(made, cheapest(made), options.pop("limits", FREE), cost, max_kl, **options)


KL = {"a0": 0.3, "a1": 0.1, "a2": 0.2}


class TestDrops:
    def test_the_cheapest_first_within_their_share(self) -> None:
        made = recording("aoaoao", kl=KL)
        cost = Ledger(KL)
        decisions = run(made, cost, 0.7, drop_share=0.5)

        assert outcome(decisions) == [("a1", "kept"), ("a2", "kept"), ("a0", "refused")]
        assert plan_of(made, decisions) == Plan(drop=["a1", "a2"])
        assert [decision.kl for decision in decisions] == pytest.approx([0.1, 0.3, None])
        assert [decision.added for decision in decisions] == pytest.approx([0.1, 0.2, None])

    def test_what_is_recorded_to_cost_too_much_is_not_measured(self) -> None:
        cost = Ledger(KL)
        decisions = run(recording("aoaoao", kl=KL), cost, 0.7)

        assert not any("a0" in plan.drop for plan in cost.asked)
        assert decisions[-1].why == "recorded to add 0.3 by itself; it may add 0.05"

    def test_what_costs_more_than_recorded_is_refused_and_the_next_one_tried(self) -> None:
        cost = Ledger({"a0": 0.3, "a1": 5.0, "a2": 0.2})
        decisions = run(recording("aoaoao", kl=KL), cost, 1.2)

        assert outcome(decisions) == [("a1", "refused"), ("a2", "kept"), ("a0", "kept")]
        assert decisions[0].why == "adds 5; it may add 0.6"

    def test_no_more_than_were_asked_for_but_others_for_those_refused(self) -> None:
        cost = Ledger({"a0": 0.0, "a1": 5.0, "a2": 0.0})
        decisions = run(recording("aoaoao", kl=KL), cost, 1.0, count=1)

        assert outcome(decisions) == [("a1", "refused"), ("a2", "kept")]

    @pytest.mark.parametrize("error", [PlanError("no such name"), NotFiniteError("NaN in batch 3")])
    def test_what_cannot_be_applied_or_makes_nan_is_refused_with_the_reason(self, error: Exception) -> None:
        def cost(plan: Plan) -> float:
            if "a1" in plan.drop:
                raise error
            return 0.0

        decisions = run(recording("aoao", kl=0.0), cost, 1.0)
        assert outcome(decisions) == [("a0", "kept"), ("a1", "refused")]
        assert decisions[1].why == str(error)

    def test_other_errors_are_nobodys_to_hide(self) -> None:
        def cost(plan: Plan) -> float:
            if plan:
                raise RuntimeError("out of memory")
            return 0.0

        with pytest.raises(RuntimeError):
            run(recording("ao"), cost, 1.0)


class TestGroups:
    def test_one_that_fits_its_share_is_kept_whole(self) -> None:
        decisions = run(recording("ffff"), Ledger(step=0.125), 0.375)
        assert outcome(decisions) == [("f0f1f2f3", "kept")]

    def test_one_that_does_not_is_split_and_its_halves_tried(self) -> None:
        cost = Ledger(groups={"f0f1f2f3": 9.0, "f0f1": 0.1, "f2f3": 8.0})
        decisions = run(recording("ffff"), cost, 1.0)

        assert outcome(decisions) == [("f0f1f2f3", "split"), ("f0f1", "kept"), ("f2f3", "refused")]
        assert decisions[0].why == "adds 9; it may add 1"
        assert plan_of(recording("ffff"), decisions) == Plan(parallel=[["f0", "f1"]])

    def test_the_odd_one_out_of_three_is_left_alone(self) -> None:
        made = recording("fff", worst={("f0", "f1"): 1.0})
        assert outcome(run(made, Ledger(groups={"f0f1f2": 9.0}), 1.0)) == [("f0f1f2", "split"), ("f1f2", "kept")]

    def test_a_share_is_that_of_the_steps_saved_in_what_is_left(self) -> None:
        """0.6 are left for five steps: three steps may add 0.36; then two may add what there is."""
        made = recording("ffffafff", worst={("f4", "f5"): 1.0})
        assert outcome(run(made, Ledger(groups={"f0f1f2f3": 0.35, "f4f5f6": 0.25}), 0.6, count=0)) == [
            ("f0f1f2f3", "kept"),
            ("f4f5f6", "kept"),
        ]
        assert outcome(run(made, Ledger(groups={"f0f1f2f3": 0.37}), 0.6, count=0))[0] == ("f0f1f2f3", "split")

    def test_what_drops_leave_of_the_budget_is_theirs(self) -> None:
        decisions = run(recording("faf", kl={"a0": 0.1}), Ledger({"a0": 0.1}, {"f0f1": 0.9}), 1.0)
        assert outcome(decisions) == [("a0", "kept"), ("f0f1", "kept")]

    def test_one_recorded_to_cost_too_much_is_split_unmeasured(self) -> None:
        cost = Ledger()
        decisions = run(recording("ffff", groups={("f0", "f1", "f2", "f3"): 2.0}), cost, 1.0)

        assert outcome(decisions) == [("f0f1f2f3", "split"), ("f0f1", "kept"), ("f2f3", "kept")]
        assert ("f0", "f1", "f2", "f3") not in [group for plan in cost.asked for group in plan.parallel]

    def test_they_keep_to_the_limits(self) -> None:
        decisions = run(recording("ffff"), Ledger(), 1.0, limits=Limits(max_width=20))
        assert outcome(decisions) == [("f0f1", "kept"), ("f2f3", "kept")]


TWO = {"a0": 0.1, "a1": 0.2}
"""For ``fafoffaf``."""


class TestTheWhole:
    def test_a_final_measurement_above_the_budget_takes_the_costliest_edits_back(self) -> None:
        made = recording("fafoffaf", kl=TWO)
        cost = Ledger(TWO, {"f0f1": 0.1, "f2f3f4": 0.3})
        decisions = run(made, cost, 1.0, final=lambda plan: 2 * cost(plan))

        assert outcome(decisions) == [("a0", "kept"), ("a1", "kept"), ("f0f1", "kept"), ("f2f3f4", "refused")]
        assert decisions[-1].why == "taken back: the plan as a whole costs 1.4, above 1"

    def test_with_a_drop_go_the_groups_across_it(self) -> None:
        made = recording("fafoffaf", kl=TWO)
        cost = Ledger(TWO, {"f0f1": 0.01, "f2f3f4": 0.1})
        decisions = run(made, cost, 1.0, final=lambda plan: 5 * cost(plan))

        assert outcome(decisions) == [("a0", "kept"), ("a1", "refused"), ("f0f1", "kept"), ("f2f3f4", "refused")]
        assert decisions[-1].why == "taken back with a drop that it cannot do without"

    def test_nan_in_the_end_is_above_every_budget(self) -> None:
        def final(plan: Plan) -> float:
            if plan:
                raise NotFiniteError("NaN")
            return 0.0

        made = recording("ff")
        assert plan_of(made, run(made, Ledger(), 1.0, final=final)) == Plan()

    def test_the_recorded_plan_is_a_part_of_it_and_of_its_cost(self) -> None:
        base = Plan(drop=["gone"], parallel=[["f8", "f9"]])
        made = recording("fff", plan=base)
        decisions = run(made, Ledger({"gone": 0.4}, {"f0f1f2": 0.5}), 1.0)

        assert plan_of(made, decisions) == Plan(drop=["gone"], parallel=[["f8", "f9"], ["f0", "f1", "f2"]])
        assert outcome(run(made, Ledger({"gone": 0.4}, {"f0f1f2": 0.7}), 1.0))[0] == ("f0f1f2", "split")

    def test_a_recorded_plan_above_the_budget_is_an_error(self) -> None:
        with pytest.raises(PlanError, match=r"recorded|recording was made under costs 0\.4 nats per token by itself"):
            run(recording("ff", plan=Plan(drop=["gone"])), Ledger({"gone": 0.4}), 0.3)

    def test_each_decision_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "fxfuse"):
            decisions = run(recording("faf"), Ledger(groups={"f0f1": 9.0}), 1.0)

        assert caplog.messages[:-1] == [str(decision) for decision in decisions]
        assert caplog.messages[-1] == "the plan costs 0 nats per token, and may cost 1"
        assert caplog.messages[1] == "refused parallel f0 + f1 (score 0, KL 9): adds 9; it may add 1"

    @given(recordings(), st.integers(0, 2**16), st.floats(0, 3), st.floats(0, 1))
    def test_whatever_plans_cost_the_one_that_comes_out_is_within_the_budget(
        self, made: Recording, seed: int, max_kl: float, drop_share: float
    ) -> None:
        def cost(plan: Plan) -> float:
            draw = random.Random(f"{seed} {plan!r}")
            if plan and draw.random() < 0.1:
                raise draw.choice([PlanError("cannot be applied"), NotFiniteError("NaN")])
            return draw.random() if plan else 0.0

        def final(plan: Plan) -> float:
            return random.Random(f"final {seed} {plan!r}").random() if plan else 0.0

        plain = plan_of(made, run(made, cost, max_kl, drop_share=drop_share))
        checked = plan_of(made, run(made, cost, max_kl, drop_share=drop_share, final=final))

        assert cost(plain) <= max_kl
        assert final(checked) <= max_kl
        assert set(plain.drop) <= set(names_of(made, "a"))

    @given(recordings(), st.floats(0, 3), st.floats(0, 3))
    def test_where_costs_add_up_a_larger_budget_drops_the_same_and_more(
        self, made: Recording, one: float, other: float
    ) -> None:
        kl = {name: float(made.kl[made.index(name)]) for name in names_of(made, "a")}
        less, more = (set(plan_of(made, run(made, Ledger(kl), budget)).drop) for budget in sorted([one, other]))

        assert less <= more

    @given(recordings())
    def test_without_a_price_it_is_what_the_recording_proposes(self, made: Recording) -> None:
        found = plan_of(made, run(made, Ledger(), math.inf))

        assert found == plan_of(made, propose(made, cheapest(made), FREE))
        assert set(found.drop) == set(names_of(made, "a"))
