from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from fxfuse import Plan
from fxfuse.errors import PlanError, RecordError
from fxfuse.measure.recording import Recording
from fxfuse.planning.candidates import apart, candidates, edits, together
from fxfuse.planning.costs import Use
from tests.planning.costs import costs_of
from tests.planning.recordings import recording, recordings


class TestEdits:
    def test_branches_may_leave_and_intervals_join_once_the_attentions_between_them_are_gone(self) -> None:
        made = recording("afafaf")
        assert set(edits(made, costs_of(made), max_group=3)) == {
            *(Plan(drop=[name]) for name in ("a0", "f0", "a1", "f1", "a2", "f2")),
            Plan(drop=["a1"], parallel=[["f0", "f1"]]),
            Plan(drop=["a2"], parallel=[["f1", "f2"]]),
            Plan(drop=["a1", "a2"], parallel=[["f0", "f1", "f2"]]),
            Plan(parallel=[["a0", "a1"], ["f0", "f1"]]),
            Plan(parallel=[["a1", "a2"], ["f1", "f2"]]),
        }

    def test_what_is_no_attention_parts_intervals(self) -> None:
        made = recording("faofaf")
        assert [edit for edit in edits(made, costs_of(made)) if edit.parallel] == [
            Plan(drop=["a1"], parallel=[["f1", "f2"]])
        ]

    def test_whole_blocks_stand_in_parallel_where_all_reduces_cost_time(self) -> None:
        made = recording("afafaf")
        blocks = [("a0", "f0"), ("a1", "f1"), ("a2", "f2")]
        shared = costs_of(made, reduction=0.25)
        found = [edit for edit in edits(made, shared, max_group=3) for group in edit.parallel if group[0] in blocks]
        assert found == [Plan(parallel=[blocks[:2]]), Plan(parallel=[blocks]), Plan(parallel=[blocks[1:]])]
        assert shared.gain(found[1]) == Use(0.5)

    def test_attentions_may_be_made_linear_where_a_map_fits(self) -> None:
        made = recording("afaf")
        found = edits(made, costs_of(made, no_map=("a1",)), linear=True)
        assert [edit for edit in found if edit.linear] == [Plan(linear=["a0"])]

    def test_ffns_may_be_narrowed_to_the_units_that_are_worth_most(self) -> None:
        made = replace(recording("afx"), units={"f0": torch.arange(10).float()})
        found = edits(made, costs_of(made), narrow=(0.5, 0.2))
        assert [edit for edit in found if edit.narrow] == [
            Plan(narrow={"f0": range(5, 10)}), Plan(narrow={"f0": [8, 9]})
        ]  # fmt: skip
        with pytest.raises(RecordError, match="record again"):
            edits(recording("af"), costs_of(made), narrow=(0.5,))
        assert not [edit for edit in edits(made, costs_of(made)) if edit.narrow]

    def test_what_the_recorded_plan_names_is_left_alone(self) -> None:
        made = recording("afff", plan=Plan(parallel=[["f1", "f2"]]))
        assert {name for edit in edits(made, costs_of(made)) for name in edit.names} == {"a0", "f0"}


class TestTogether:
    def test_edits_make_one_plan_in_stream_order(self) -> None:
        made = recording("afafafaf", plan=Plan(drop=["gone"]))
        given_ = [Plan(drop=["a3"], parallel=[["f2", "f3"]]), Plan(linear=["a2"]), Plan(drop=["a0"])]
        assert together(made, given_) == Plan(drop=["gone", "a0", "a3"], linear=["a2"], parallel=[["f2", "f3"]])

    def test_units_that_are_kept_stay_kept(self) -> None:
        made = recording("afaf", plan=Plan(narrow={"f1": [1, 2]}))
        plan = together(made, [Plan(narrow={"f0": [0, 3]})])
        assert plan == Plan(narrow={"f0": [0, 3], "f1": [1, 2]})
        assert apart(plan, made) == (Plan(narrow={"f0": [0, 3]}),)

    def test_one_branch_cannot_be_in_two(self) -> None:
        with pytest.raises(PlanError, match="a0"):
            together(recording("af"), [Plan(drop=["a0"]), Plan(linear=["a0"])])

    @given(recordings())
    def test_a_plan_comes_apart_into_the_edits_that_it_was_made_of(self, made: Recording) -> None:
        chosen: list[Plan] = []
        for edit in reversed(edits(made, costs_of(made), max_group=3)):
            if not set(edit.names) & {name for other in chosen for name in other.names}:
                chosen.append(edit)
        assert set(apart(together(made, chosen), made)) == set(chosen)


def test_candidates_know_what_they_save() -> None:
    made = recording("afaf")
    costs = costs_of(made)
    edit = Plan(drop=["a1"], parallel=[["f0", "f1"]])
    (found,) = candidates(costs, {edit: 0.25})
    assert (found.edit, found.cost) == (edit, 0.25)
    assert found.gain == Use(1.0 + 0.5, 1000.0 + 64.0, 64.0)
