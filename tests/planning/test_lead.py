from __future__ import annotations

import math

import pytest

from fxfuse import Plan
from fxfuse.errors import OptionError, RecordError
from fxfuse.planning import make_plan
from fxfuse.planning.changes import recorded_costs, recorded_pairs
from tests.planning.costs import costs_of
from tests.planning.recordings import recording

KL = {"a0": 0.3, "a1": 0.1, "a2": 0.2, "f0": 1.0, "f1": 2.0, "f2": 3.0}


class TestRecorded:
    def test_drops_cost_their_kl_and_groups_what_their_members_turn(self) -> None:
        made = recording("afafaf", kl=KL, mean={("f0", "f1"): 0.05, ("f0", "f2"): 0.1, ("f1", "f2"): 0.9})
        group = Plan(drop=["a1", "a2"], parallel=[["f0", "f1", "f2"]])
        found = recorded_costs(made, [Plan(drop=["a0"]), Plan(linear=["a1"]), group])
        assert list(found.values()) == pytest.approx([0.3, 0.1, 0.3 + 2.0 * 0.1 + 3.0])

    def test_a_recorded_group_costs_what_was_recorded(self) -> None:
        made = recording("ff", kl=KL, groups={("f0", "f1"): 0.4})
        assert recorded_costs(made, [Plan(parallel=[["f0", "f1"]])]) == {Plan(parallel=[["f0", "f1"]]): 0.4}

    def test_what_depends_on_each_other_costs_more_together(self) -> None:
        made = recording("afaf", kl={"a0": 0.4, "a1": 0.9}, mean={("a0", "a1"): 0.5})
        drops = {Plan(drop=["a0"]): 0.4, Plan(drop=["a1"]): 0.9, Plan(drop=["f0"]): 1.0}
        assert recorded_pairs(made, drops) == pytest.approx({(0, 1): 2 * 0.25 * 0.6, (0, 2): 0.0, (1, 2): 0.0})


class TestLead:
    def test_the_cheapest_edits_that_save_enough(self) -> None:
        made = recording("afafaf", kl=KL, mean={("a1", "a2"): 1.0})  # else three choices would cost the same
        costs = costs_of(made)
        assert make_plan(made, target_latency=0.8, costs=costs) == Plan(
            drop=["a1", "a2"], parallel=[["f0", "f1", "f2"]]
        )

    def test_of_two_that_depend_on_each_other_one_is_left(self) -> None:
        made = recording(
            "aoaoao", kl=dict.fromkeys(("a0", "a1", "a2"), 0.1), mean={("a0", "a1"): 1.0, ("a1", "a2"): 1.0}
        )
        assert make_plan(made, target_latency=0.8, costs=costs_of(made)) == Plan(drop=["a0", "a2"])

    def test_what_is_missing_is_said(self) -> None:
        with pytest.raises(OptionError, match="give costs, or model and batches"):
            make_plan(recording("af"), target_latency=0.8)
        with pytest.raises(RecordError, match="no kl"):
            make_plan(recording("af", kl=math.nan), target_latency=0.8, costs=costs_of(recording("af")))
        with pytest.raises(OptionError, match="max_kl is measured"):
            make_plan(recording("af"), target_latency=0.8, max_kl=1.0, costs=costs_of(recording("af")))
