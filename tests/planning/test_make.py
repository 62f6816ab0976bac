from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fxfuse
from fxfuse import Plan
from fxfuse.errors import OptionError, RecordError
from fxfuse.measure.recording import Recording
from fxfuse.planning import Choices, decide, make_plan, plan_of
from tests.models.tiny import llama, planned, tokens
from tests.planning.recordings import recording

KL = {"a0": 0.5, "a1": 0.1, "a2": 0.3}
ATTENTIONS = [f"model.layers.{index}.self_attn" for index in range(3)]
MLPS = [f"model.layers.{index}.mlp" for index in range(3)]


class TestFromARecordingAlone:
    @pytest.mark.parametrize(
        ("options", "drop", "parallel"),
        [
            ({}, [], []),
            ({"drop": 1}, ["a1"], [["f0", "f1"]]),
            ({"drop": 0.67}, ["a1", "a2"], [["f0", "f1", "f2"]]),
            ({"max_score": 0.2}, ["a1"], [["f0", "f1"]]),
            ({"drop": 2, "score": "norm_ratio"}, ["a1", "a2"], [["f0", "f1", "f2"]]),
            ({"drop": 2, "max_width": 20}, ["a1", "a2"], [["f0", "f1"]]),
            ({"drop": 2, "keep_last": True}, ["a1", "a2"], [["f0", "f1"]]),
            ({"drop": 2, "max_distance": 0.1}, ["a1", "a2"], [["f1", "f2"]]),
        ],
    )
    def test_the_cheapest_attentions_leave_and_the_ffns_between_join(
        self, options: dict[str, Any], drop: list[str], parallel: list[list[str]]
    ) -> None:
        made = recording("afafaf", kl=KL, mean={("f0", "f1"): 0.2})
        assert make_plan(made, **options) == Plan(drop=drop, parallel=parallel)

    def test_a_recording_under_a_plan_goes_on_from_it(self) -> None:
        made = recording("afff", plan=Plan(drop=["a1", "a2"]))
        assert make_plan(made) == Plan(drop=["a1", "a2"], parallel=[["f0", "f1", "f2"]])

    def test_one_without_logits_is_enough_where_no_score_is_asked_for(self) -> None:
        made = recording("afff", kl=math.nan)
        assert make_plan(made, drop=0) == Plan(parallel=[["f0", "f1", "f2"]])
        with pytest.raises(RecordError, match="score='cosine'"):
            make_plan(made, drop=1)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"drop": "foo"}, "drop"),
            ({"drop": 9}, "there are 3 attentions"),
            ({"score": "loss", "drop": 1}, "no score 'loss'"),
            ({"max_score": -1.0}, "max_score"),
            ({"max_distance": -0.1}, "max_distance"),
            ({"max_width": -5}, "max_width"),
            ({"max_kl": 0.1}, "max_kl is measured: give model and batches"),
            ({"max_kl": -1.0}, "max_kl is a budget"),
            ({"max_kl": math.nan}, "max_kl is a budget"),
            ({"drop_share": 2.0}, "drop_share"),
            ({"search_tokens": 0}, "search_tokens"),
            ({"model": llama(1), "max_kl": 1.0}, "give both, or neither"),
            ({"batches": [], "max_kl": 1.0}, "give both, or neither"),
            ({"model": llama(1), "batches": []}, "give max_kl"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": "all"}, "max_tokens"),
            ({"max_kl": "0.05"}, "max_kl"),
            ({"max_score": "low"}, "max_score"),
            ({"max_distance": [0.1]}, "max_distance"),
            ({"max_width": 1.5}, "max_width"),
            ({"drop_share": "half"}, "drop_share"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_nonsense_is_one(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(OptionError, match=words):
            make_plan(recording("afafaf", kl=KL), **options)

    def test_a_recording_of_another_model_is_one(self) -> None:
        with pytest.raises(RecordError, match="recording of another model"):
            make_plan(recording("afafaf", kl=KL), llama(1), [], max_kl=1.0)

    def test_it_is_one_before_anything_is_measured(self) -> None:
        with pytest.raises(RecordError, match="recording of another model"):  # and not that there is no batch
            make_plan(recording("afafaf", kl=KL), llama(1), [], target_latency=0.9)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    return [{"input_ids": tokens(2, 12, seed=seed), "use_cache": False} for seed in (1, 2)]


@pytest.fixture(scope="module")
def recorded(batches: list[dict[str, Any]]) -> Recording:
    return fxfuse.record(llama(3), batches[:1])


class TestWithTheModel:
    def cost(self, plan: Plan, batches: list[dict[str, Any]]) -> float:
        """By the model's own modules."""
        made = planned(llama(3), plan.drop, plan.parallel)  # type: ignore[arg-type]
        found = fxfuse.evaluate(made, batches, llama(3)).kl
        assert found is not None
        return found

    def test_a_plan_within_the_budget_is_found(self, recorded: Recording, batches: list[dict[str, Any]]) -> None:
        decisions = decide(recorded, Choices(max_kl=0.5), llama(3), batches)
        plan = plan_of(recorded, decisions)
        costs = [decision.kl for decision in decisions if decision.outcome == "kept"]

        assert plan.drop and plan.parallel
        assert any(decision.outcome == "refused" for decision in decisions)
        assert costs[-1] == pytest.approx(self.cost(plan, batches), rel=1e-8)
        assert self.cost(plan, batches) <= 0.5

    def test_no_budget_no_edit(self, recorded: Recording, batches: list[dict[str, Any]]) -> None:
        assert make_plan(recorded, llama(3), batches, max_kl=0.0) == Plan()

    def test_any_budget_every_edit(self, recorded: Recording, batches: list[dict[str, Any]]) -> None:
        assert make_plan(recorded, llama(3), batches, max_kl=1e9) == Plan(drop=ATTENTIONS, parallel=[MLPS])

    def test_at_most_so_many_drops(self, recorded: Recording, batches: list[dict[str, Any]]) -> None:
        plan = make_plan(recorded, llama(3), batches, drop=1, max_kl=1e9)
        assert list(plan.drop) == [min(ATTENTIONS, key=lambda name: float(recorded.kl[recorded.index(name)]))]

    def test_the_search_may_be_short_but_the_end_is_measured_on_everything(
        self, recorded: Recording, batches: list[dict[str, Any]]
    ) -> None:
        plan = make_plan(recorded, llama(3), batches, max_kl=0.5, search_tokens=3)
        assert self.cost(plan, batches) <= 0.5

    def test_a_compiled_model_is_its_original(self, recorded: Recording, batches: list[dict[str, Any]]) -> None:
        compiled: Any = torch.compile(llama(3), backend="eager")
        assert make_plan(recorded, compiled, batches, max_kl=1e9, drop=0) == Plan()

    def test_other_weights_are_an_error(self, recorded: Recording, batches: list[dict[str, Any]]) -> None:
        model = llama(3)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2)
        with pytest.raises(RecordError, match="other weights"):
            make_plan(recorded, model, batches, max_kl=1.0)
