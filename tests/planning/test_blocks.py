from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse import Plan
from fxfuse.errors import OptionError
from fxfuse.measure.recording import Recording
from fxfuse.planning import block_windows
from fxfuse.planning.blocks import block_runs
from tests.planning.recordings import LAYOUTS, recording, recordings


def joined(found: Any) -> list[str]:
    return ["".join(map("".join, run)) for run in found]


class TestBlocks:
    @pytest.mark.parametrize(
        ("layout", "expected"),
        [
            ("afafaf", ["a0f0a1f1a2f2"]),
            ("(af)(af)", ["a0f0a1f1"]),
            ("(fa)(af)", ["a0f0a1f1"]),  # in a sum the order says nothing
            ("afamap", ["a0f0a1m0a2p0"]),
            ("afxaf", ["a0f0", "a1f1"]),
            ("aaf", ["a1f0"]),
            ("fafa", ["a0f1"]),
            ("afoaf", ["a0f0", "a1f1"]),
            ("af|af", ["a0f0", "a1f1"]),
            ("ffff", []),
        ],
    )
    def test_are_an_attention_and_the_ffn_after_it(self, layout: str, expected: list[str]) -> None:
        assert joined(block_runs(recording(layout))) == expected

    def test_that_the_recorded_plan_edits_are_none(self) -> None:
        made = recording("afafafaf", plan=Plan(parallel=[["f1", "gone"]]))
        assert joined(block_runs(made)) == ["a0f0", "a2f2a3f3"]

    @given(LAYOUTS)
    def test_of_a_run_follow_each_other(self, layout: str) -> None:
        made = recording(layout)
        place = {branch.name: branch for branch in made.branches}
        for run in block_runs(made):
            for one, other in pairwise(run):
                assert place[other[0]].adds == place[one[1]].adds + 1
                assert place[other[0]].stream == place[one[1]].stream


class TestWindows:
    def made(self, **distances: float) -> Recording:
        """Six blocks; ``f1a3=0.5`` says how far the branch a3 is moved by dropping f1."""
        return recording("af" * 6, mean={(key[:2], key[2:]): value for key, value in distances.items()})

    def test_the_least_dependent_come_first_and_do_not_overlap(self) -> None:
        made = self.made(f0a1=0.5, f1f2=0.2, a2a3=0.1, f3a4=0.3, a4f5=0.4)
        assert joined(block_windows(made, 2)) == ["a2f2a3f3", "a4f4a5f5", "a0f0a1f1"]
        assert joined(block_windows(made, 2, 1)) == ["a2f2a3f3"]

    def test_every_pair_of_blocks_counts(self) -> None:
        made = self.made(a0f2=0.5, f1f3=0.2, f2a4=0.3, f3f4=0.1)
        assert joined(block_windows(made, 3, 1)) == ["a3f3a4f4a5f5"]

    def test_of_equals_that_with_the_least_sum(self) -> None:
        made = self.made(a0a1=0.5, a1a2=0.5, a2a3=0.5, a3a4=0.5, a4a5=0.5, a0a2=0.1, a1a3=0.1, a3a5=0.1)
        assert joined(block_windows(made, 3)) == ["a2f2a3f3a4f4"]

    def test_the_order_within_a_block_is_its_own_affair(self) -> None:
        assert joined(block_windows(self.made(a0f0=0.9, a3f3=0.8), 2, 3)) == ["a0f0a1f1", "a2f2a3f3", "a4f4a5f5"]

    def test_there_may_be_none(self) -> None:
        assert block_windows(recording("afaf"), 3) == ()

    @pytest.mark.parametrize(("size", "count"), [(1, None), (0, 1), (2, 0), (2, -1)])
    def test_nonsense_is_an_error(self, size: int, count: int | None) -> None:
        with pytest.raises(OptionError, match="at least"):
            block_windows(recording("afaf"), size, count)

    @given(recordings(), st.integers(2, 4))
    def test_they_make_a_legal_plan(self, made: Recording, size: int) -> None:
        windows = block_windows(made, size)

        assert Plan(parallel=windows).parallel == windows
        for window in windows:
            assert len(window) == size
            (start,) = [run.index(window[0]) for run in block_runs(made) if window[0] in run]
            (run,) = [run for run in block_runs(made) if window[0] in run]
            assert run[start : start + size] == window

    @given(recordings())
    def test_the_first_is_no_worse_than_any(self, made: Recording) -> None:
        def worst(window: Any) -> float:
            return max(
                float(made.mean[made.index(a), made.index(b)])
                for position, block in enumerate(window)
                for other in window[position + 1 :]
                for a in block
                for b in other
            )

        every = [run[at : at + 2] for run in block_runs(made) for at in range(len(run) - 1)]
        if every:
            assert worst(block_windows(made, 2)[0]) == min(map(worst, every))


def test_a_recorded_drop_leaves_its_ffn_without_a_block() -> None:
    made = recording("affaf", plan=Plan(drop=["gone"]))
    assert joined(block_runs(made)) == ["a0f0", "a1f2"]
