from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse import Plan
from fxfuse.errors import OptionError
from fxfuse.measure.recording import BranchRecord, Recording
from fxfuse.planning import Limits, propose_groups, runs
from fxfuse.planning.groups import distance, follow, in_two, promise, width
from tests.planning.recordings import LAYOUTS, names_of, recording, recordings


def joined(found: tuple[tuple[str, ...], ...]) -> list[str]:
    return ["".join(each) for each in found]


MEAN = {("f0", "f1"): 0.1, ("f1", "f2"): 0.2, ("f0", "f2"): 0.3, ("f2", "f3"): 0.1, ("f0", "f3"): 0.9}

LIMITS = st.builds(
    Limits,
    max_distance=st.none() | st.floats(0, 1),
    max_width=st.none() | st.integers(1, 60),
    keep_last=st.booleans(),
)


class TestRuns:
    @pytest.mark.parametrize(
        ("layout", "drop", "expected"),
        [
            ("afafaf", "", ["f0", "f1", "f2"]),
            ("afafaf", "a1", ["f0f1", "f2"]),
            ("afafaf", "a0 a1 a2", ["f0f1f2"]),
            ("afafaf", "a0", ["f0", "f1", "f2"]),  # nothing comes before f0
            ("affpaf", "", ["f0f1p0", "f2"]),  # a hybrid's own run, gated or not
            ("afoaf", "a1", ["f0", "f1"]),  # something else stands between
            ("fmf", "", ["f0", "f1"]),
            ("fxf", "", ["f0", "f1"]),  # an FFN that cannot be fused ends a run
            ("ff|ff", "", ["f0f1", "f2f3"]),  # streams are apart
            ("(af)(af)(af)", "a1 a2", ["f1f2"]),  # parallel attention and FFN: a0 is added with f0
            ("(af)(af)", "", []),
        ],
    )
    def test_of_consecutive_ffns(self, layout: str, drop: str, expected: list[str]) -> None:
        assert joined(runs(recording(layout), drop.split())) == expected

    @given(LAYOUTS.filter(lambda layout: "(" not in layout), st.data())
    def test_are_what_a_search_in_the_letters_finds(self, layout: str, data: st.DataObject) -> None:
        made = recording(layout)
        drop = data.draw(st.sets(st.sampled_from(names_of(made, "a")))) if "a" in layout else set()
        left = "|".join(
            "".join(branch.name for branch in made.branches if branch.stream == stream and branch.name not in drop)
            for stream in range(layout.count("|") + 1)
        )
        assert joined(runs(made, drop)) == re.findall(r"(?:[fp]\d+)+", left)

    def test_an_ffn_that_reads_an_earlier_point_is_in_none(self) -> None:
        """As in models that compute attention and FFN from one point and add them one after the other."""
        made = recording("afafaf")
        branches = [
            BranchRecord(b.name, b.kind, b.stream, b.reads - (b.kind != "attention"), b.adds, b.parameters, b.width, "")
            for b in made.branches
        ]
        made = Recording(**{**vars(made), "branches": tuple(branches)})

        assert runs(made) == ()
        assert joined(runs(made, ["a1", "a2"])) == ["f1f2"]  # f0 does not see a0, which is added before it

    def test_the_recorded_plans_own_groups_are_in_none(self) -> None:
        made = recording("ffff", plan=Plan(parallel=[["f1", "gone"]]))
        assert joined(runs(made)) == ["f0", "f2f3"]


class TestGroups:
    @pytest.mark.parametrize(
        ("limits", "expected"),
        [
            ({}, ["f0f1f2f3"]),
            ({"max_distance": 0.5}, ["f0f1f2"]),
            ({"max_distance": 0.25}, ["f0f1", "f2f3"]),
            ({"max_distance": 0.05}, []),
            ({"max_width": 20}, ["f0f1", "f2f3"]),
            ({"max_width": 19}, []),
            ({"max_width": 30, "max_distance": 0.25}, ["f0f1", "f2f3"]),
            ({"keep_last": True}, ["f0f1f2"]),
            ({"keep_last": True, "max_width": 20}, ["f0f1"]),
        ],
    )
    def test_are_parted_where_a_limit_says_so(self, limits: dict[str, Any], expected: list[str]) -> None:
        assert joined(propose_groups(recording("ffff", mean=MEAN), (), Limits(**limits))) == expected

    def test_their_distance_is_that_of_the_later_one_when_the_earlier_one_is_dropped(self) -> None:
        made = recording("ffff", mean=MEAN | {("f1", "f0"): 2.0})
        assert distance(made, ["f0", "f1", "f2"]) == pytest.approx(0.3)
        assert distance(made, ["f2"]) == 0.0
        assert width(made, ["f0", "f2"]) == 20

    def test_every_last_ffn_of_a_run_is_left_out_not_that_of_a_group_alone(self) -> None:
        assert joined(propose_groups(recording("fffaff"), (), Limits(keep_last=True))) == ["f0f1"]

    @pytest.mark.parametrize("limits", [{"max_distance": -1}, {"max_distance": math.nan}, {"max_width": 0}])
    def test_limits_out_of_range_are_an_error(self, limits: dict[str, Any]) -> None:
        with pytest.raises(OptionError, match=next(iter(limits))):
            Limits(**limits)

    @given(recordings(), st.data())
    def test_they_are_legal(self, made: Recording, data: st.DataObject) -> None:
        """Disjoint, consecutive, within their limits; nothing dropped is grouped; the whole is a Plan."""
        limits, drop = data.draw(LIMITS), data.draw(st.sets(st.sampled_from(["a0", "a1", "a2", "f0", "p0"])))
        drop &= {branch.name for branch in made.branches}
        groups = propose_groups(made, drop, limits)

        assert Plan(drop=sorted(drop), parallel=groups).parallel == groups  # disjoint, and none of them dropped
        place = {branch.name: branch for branch in made.branches}
        for group in groups:
            first, last = place[group[0]], place[group[-1]]
            assert {place[name].stream for name in group} == {first.stream}
            between = [b.name for b in made.branches if b.stream == first.stream and first.adds <= b.adds <= last.adds]
            assert [name for name in between if name not in drop] == list(group)
            indices = [made.index(name) for name in group]
            for position, i in enumerate(indices):
                for j in indices[position + 1 :]:
                    assert limits.max_distance is None or made.mean[i, j] <= limits.max_distance
            assert limits.max_width is None or sum(place[name].width for name in group) <= limits.max_width
            assert follow(made, group, drop)

    @given(recordings(), st.data())
    def test_no_other_choice_leaves_fewer_steps(self, made: Recording, data: st.DataObject) -> None:
        limits = data.draw(LIMITS.filter(lambda limits: not limits.keep_last))

        def fewest(run: tuple[str, ...]) -> int:
            best = [0]
            for end in range(1, len(run) + 1):
                best.append(min(best[at] + 1 for at in range(end) if end - at == 1 or limits.allow(made, run[at:end])))
            return best[-1]

        groups = propose_groups(made, (), limits)
        ffns = sum(len(run) for run in runs(made))
        assert ffns - sum(len(group) - 1 for group in groups) == sum(map(fewest, runs(made)))

    @given(recordings(), st.floats(0, 1), st.floats(0, 1), st.integers(1, 60), st.integers(1, 60))
    def test_looser_limits_save_as_many_steps_or_more(
        self, made: Recording, one: float, other: float, narrow: int, wide: int
    ) -> None:
        def saved(max_distance: float, max_width: int) -> int:
            limits = Limits(max_distance=max_distance, max_width=max_width)
            return sum(len(group) - 1 for group in propose_groups(made, (), limits))

        assert saved(min(one, other), min(narrow, wide)) <= saved(max(one, other), max(narrow, wide))


class TestSplitting:
    @pytest.mark.parametrize(
        ("n", "cuts"), [(2, {1}), (3, {1, 2}), (4, {2}), (5, {2, 3}), (7, {3, 4}), (9, {3, 4, 5, 6})]
    )
    def test_is_done_in_the_middle_third(self, n: int, cuts: set[int]) -> None:
        found = set()
        for seed in range(40):
            generator = torch.Generator().manual_seed(seed)
            made = recording("f" * n, worst=torch.rand(n, n, generator=generator))
            one, other = in_two(made, runs(made)[0])
            assert one + other == runs(made)[0]
            found.add(len(one))
        assert found == cuts

    def test_is_done_where_the_worst_token_says(self) -> None:
        made = recording("fff", worst={("f0", "f1"): 0.9, ("f1", "f2"): 0.1, ("f0", "f2"): 1.5})
        assert in_two(made, ("f0", "f1", "f2")) == (("f0",), ("f1", "f2"))

    def test_of_equals_the_most_even(self) -> None:
        assert [len(half) for half in in_two(recording("f" * 6), runs(recording("f" * 6))[0])] == [3, 3]


def test_groups_with_a_recorded_kl_promise_more_than_those_without_and_these_less_by_their_worst_token() -> None:
    made = recording(
        "ffaffaffaff",
        worst={("f0", "f1"): 0.9, ("f2", "f3"): 0.2},
        groups={("f4", "f5"): 0.5, ("f6", "f7"): 0.1},
    )
    assert joined(tuple(sorted(runs(made), key=lambda group: promise(made, group)))) == ["f6f7", "f4f5", "f2f3", "f0f1"]
