from __future__ import annotations

from fxfuse import Plan
from fxfuse.planning.solvers import LADDERS, first_within
from fxfuse.planning.solvers.ladders import layer_parallelism, llm_drop, paper, paper_windows, short_gpt
from tests.planning.recordings import recording

KL = {"a0": 0.3, "a1": 0.1, "a2": 0.2}


class TestRules:
    def test_the_paper_leaves_the_last_ffn_of_each_run_alone(self) -> None:
        rungs = list(paper(recording("afafafaf", kl=KL)))
        assert rungs[0] == Plan(drop=["a3"])
        assert rungs[2] == Plan(drop=["a1", "a2", "a3"], parallel=[["f0", "f1", "f2"]])

    def test_its_whole_blocks_are_windows_of_four(self) -> None:
        made = recording("af" * 9, mean={("a0", "a1"): 0.5})
        first, second = paper_windows(made)
        assert len(first.parallel) == 1
        assert len(second.parallel) == 2
        assert [len(group) for group in second.parallel] == [4, 4]
        assert "a0" not in second.names  # of nine blocks one is left over, and the first depends most

    def test_layers_go_in_pairs_where_they_depend_on_each_other_least(self) -> None:
        made = recording("afafafaf", mean={("a0", "a1"): 0.5, ("a1", "a2"): 0.1, ("a2", "a3"): 0.4})
        one, two = layer_parallelism(made)
        assert one == Plan(parallel=[["a1", "a2"], ["f1", "f2"]])
        assert two == Plan(parallel=[["a0", "a1"], ["f0", "f1"], ["a2", "a3"], ["f2", "f3"]])

    def test_llm_drop_goes_by_how_far_the_stream_turns(self) -> None:
        assert [rung.drop for rung in llm_drop(recording("afafaf", kl=KL))] == [
            ("a1",),
            ("a1", "a2"),
            ("a0", "a1", "a2"),
        ]

    def test_short_gpt_goes_by_what_whole_blocks_do(self) -> None:
        made = recording("afafaf", kl={"a0": 0.1, "f0": 0.5, "a1": 0.4, "f1": 0.1, "a2": 0.5, "f2": 0.5})
        assert [rung.drop for rung in short_gpt(made)][:2] == [("a1", "f1"), ("a0", "f0", "a1", "f1")]
        known = {("a0", "f0"): 0.1, ("a1", "f1"): 0.2, ("a2", "f2"): 0.05}
        assert next(short_gpt(made, known)).drop == ("a2", "f2")

    def test_what_the_recorded_plan_did_stays(self) -> None:
        made = recording("afaf", plan=Plan(drop=["gone"]))
        for name, ladder in LADDERS.items():
            assert all("gone" in rung.drop for rung in ladder(made)), name


def test_the_first_rung_that_saves_enough_is_taken() -> None:
    rungs = [Plan(drop=[f"a{k}" for k in range(n)]) for n in range(1, 5)]
    assert first_within(rungs, lambda plan: 10.0 - len(plan.drop), 7.5) == rungs[2]
    assert first_within(rungs, lambda plan: 10.0 - len(plan.drop), 1.0) is None
