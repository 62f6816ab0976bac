from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor, nn

import fxfuse
from fxfuse import Plan
from fxfuse.errors import OptionError, RecordError
from fxfuse.healing.alone import maps_alone
from fxfuse.healing.text import kinds
from fxfuse.measure.recording import Recording
from fxfuse.planning import Effort, Search, Targets, find_plan, make_plan
from fxfuse.planning import find as module
from tests.healing.test_own_maps import gemma3, qwen3, reference
from tests.models.tiny import llama, planned, silenced, tokens
from tests.planning.costs import costs_of

Batches = list[dict[str, Any]]

EFFORT = Effort(pool=3, patience=2, max_group=2)
LATENCY = Targets(latency=0.7)


@pytest.fixture(scope="module")
def batches() -> Batches:
    return [{"input_ids": tokens(2, 12, seed=seed), "use_cache": False} for seed in (1, 2)]


@pytest.fixture(scope="module")
def recorded(batches: Batches) -> Recording:
    return fxfuse.record(llama(3), batches[:1])


@pytest.fixture(scope="module")
def found(recorded: Recording, batches: Batches) -> Search:
    return find_plan(recorded, llama(3), batches, LATENCY, costs_of(recorded), effort=EFFORT)


def cost(plan: Plan, batches: Batches) -> float:
    """By the model's own modules."""
    made = planned(llama(3), plan.drop, plan.parallel)  # type: ignore[arg-type]  # of names alone
    kl = fxfuse.evaluate(made, batches, llama(3)).kl
    assert kl is not None
    return kl


def forbidden(*_: object, **__: object) -> object:
    raise AssertionError("this was measured before")


def test_ffns_may_be_narrowed_where_that_is_asked_for(recorded: Recording, batches: Batches) -> None:
    effort = Effort(pool=2, patience=0, max_group=1, narrow=(0.5,))

    found = find_plan(recorded, llama(3), batches, Targets(latency=0.9), costs_of(recorded), effort=effort)

    tried = {edit: kl for edit, kl in found.edits.items() if edit.narrow}
    assert [list(edit.names) for edit in tried] == [[f"model.layers.{layer}.mlp"] for layer in range(3)]
    for edit, kl in tried.items():
        own = fxfuse.evaluate(silenced(llama(3), edit), batches, llama(3)).kl
        assert kl == pytest.approx(own, rel=1e-4)  # of changes in float32
    assert any(decision.edit == "narrow" and "to 20 hidden units" in decision.why for decision in found.plan.why)


class TestFound:
    def test_the_plan_reaches_the_target(self, found: Search, recorded: Recording) -> None:
        costs = costs_of(recorded)
        assert costs.of(found.plan).seconds <= 0.7 * costs.whole
        assert all(trial.use.seconds <= 0.7 * costs.whole + 1e-9 for trial in found.trials)

    def test_its_kl_is_measured_and_it_is_the_least_of_all_tried(self, found: Search, batches: Batches) -> None:
        assert found.best.kl == pytest.approx(cost(found.plan, batches), rel=1e-8)
        assert [trial.final for trial in found.trials] == sorted(trial.final for trial in found.trials)
        assert len(found.trials) > 3  # exchanges were tried

    def test_edits_by_themselves_are_measured_too(self, found: Search, batches: Batches) -> None:
        for edit in [Plan(drop=["model.layers.1.self_attn"]), next(edit for edit in found.edits if edit.parallel)]:
            assert found.edits[edit] == pytest.approx(cost(edit, batches), rel=1e-4)

    def test_it_says_why(self, found: Search) -> None:
        told = {decision.branches: decision for decision in found.plan.why}
        for name in found.plan.drop:
            assert told[(name,)].outcome == "kept"
            assert told[(name,)].kl == found.best.kl
        assert any(decision.outcome == "refused" for decision in found.plan.why)
        assert all(math.isfinite(decision.score) for decision in found.plan.why)
        assert Plan.from_json(found.plan.to_json()).why == found.plan.why
        assert "predicted" in str(found)
        points = found.results()
        assert [point["chosen"] for point in points] == [True] + [False] * (len(points) - 1)
        assert json.loads(found.to_json())["trials"][0]["kl"] == points[0]["kl"] == found.best.kl


class TestResume:
    def test_an_interrupted_search_ends_with_the_same(
        self,
        recorded: Recording,
        batches: Batches,
        found: Search,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        costs, state = costs_of(recorded), tmp_path / "state"
        real: Callable[..., Any] = module.evaluate
        left = 2

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, "evaluate", failing)
        with pytest.raises(KeyboardInterrupt):
            find_plan(recorded, llama(3), batches, LATENCY, costs, effort=EFFORT, resume=state)
        monkeypatch.setattr(module, "evaluate", real)
        again = find_plan(recorded, llama(3), batches, LATENCY, costs, effort=EFFORT, resume=state)
        assert again.trials == found.trials

        monkeypatch.setattr(module, "evaluate", forbidden)
        known = find_plan(recorded, llama(3), batches, LATENCY, costs, effort=EFFORT, resume=state)
        assert known.plan == found.plan

    def test_the_state_of_another_search_is_an_error(
        self, recorded: Recording, batches: Batches, tmp_path: Path
    ) -> None:
        state, costs = tmp_path / "state", costs_of(recorded)
        effort = Effort(pool=1, patience=0, max_group=1)
        find_plan(recorded, llama(3), batches[:1], LATENCY, costs, effort=effort, resume=state)
        with pytest.raises(RecordError, match="other text"):
            find_plan(recorded, llama(3), batches, LATENCY, costs, effort=effort, resume=state)
        state.write_bytes(state.read_bytes()[:20])
        with pytest.raises(RecordError, match="no state of a search"):
            find_plan(recorded, llama(3), batches, LATENCY, costs, effort=effort, resume=state)


class TestMakePlan:
    def test_targets_are_its_options(self, recorded: Recording, batches: Batches, found: Search) -> None:
        given: dict[str, Any] = {"costs": costs_of(recorded), "effort": EFFORT}
        assert make_plan(recorded, llama(3), batches, target_latency=0.7, **given) == found.plan

    def test_bytes_of_cache_are_one(self, recorded: Recording, batches: Batches) -> None:
        costs, effort = costs_of(recorded), Effort(pool=1, patience=0, max_group=1)
        plan = make_plan(recorded, llama(3), batches, max_kv_bytes=100, costs=costs, effort=effort)
        assert costs.of(plan).cache <= 100

    def test_what_cannot_be_reached_is_an_error_that_says_how_far_off_it_is(
        self, recorded: Recording, batches: Batches
    ) -> None:
        given: dict[str, Any] = {"costs": costs_of(recorded), "effort": Effort(pool=1, patience=0, max_group=1)}
        with pytest.raises(OptionError, match=r"target_latency asks for 0\.05 of the time.* considered, is 0\.1"):
            make_plan(recorded, llama(3), batches, target_latency=0.05, **given)
        with pytest.raises(OptionError, match=r"max_kl asks for 1e-09"):
            make_plan(recorded, llama(3), batches, target_latency=0.9, max_kl=1e-9, **given)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"target_latency": 1.5}, "target_latency is a share"),
            ({"target_latency": 0.0}, "target_latency is a share"),
            ({"max_memory": -1.0}, "max_memory"),
            ({"max_kv_bytes": math.nan}, "max_kv_bytes"),
            ({"target_latency": 0.8}, "give costs, or model and batches"),
            ({"target_latency": 0.8, "batches": []}, "give both, or neither"),
        ],
    )
    def test_nonsense_is_an_error(self, recorded: Recording, options: dict[str, Any], words: str) -> None:
        with pytest.raises(OptionError, match=words):
            make_plan(recorded, **options)


class Mapped(nn.Module):
    """An attention of Hugging Face's whose place a linear map has taken."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return nn.functional.linear(hidden_states, self.weight), None


class TestLinear:
    TEXT: ClassVar[dict[str, Batches]] = {
        kind: [{"input_ids": tokens(2, 30, seed=seed), "use_cache": False} for seed in seeds]
        for kind, seeds in (("one", range(10, 16)), ("other", range(20, 26)))
    }
    ONE = Effort(pool=1, healed=1, patience=0, max_group=1, heal_tokens=120)

    def search(self, recorded: Recording, batches: Batches, text: dict[str, Batches], **options: Any) -> Search:
        return find_plan(
            recorded, llama(3), batches, LATENCY, costs_of(recorded), heal_on=text, effort=self.ONE, **options
        )

    def test_a_map_is_fitted_before_it_is_measured(self, recorded: Recording, batches: Batches) -> None:
        short = {kind: text[:3] for kind, text in self.TEXT.items()}  # as many as hold 120 tokens, and no more
        found = self.search(recorded, batches, self.TEXT)
        assert found.edits == self.search(recorded, batches, short).edits
        maps = maps_alone(
            llama(3), Plan(linear=[f"model.layers.{n}.self_attn" for n in range(3)]), kinds(short, 0.2, list)
        )
        for n in range(3):
            made, name = llama(3), f"model.layers.{n}.self_attn"
            made.model.layers[n].self_attn = Mapped(*maps[name].values())
            kl = fxfuse.evaluate(made, batches, llama(3)).kl
            assert found.edits[Plan(linear=[name])] == pytest.approx(kl, rel=1e-6)  # float32 logits

    @pytest.mark.slow
    @pytest.mark.parametrize("make", [qwen3, gemma3])
    def test_one_that_no_projection_of_the_model_can_be_takes_part(self, make: Any, batches: Batches) -> None:
        """Where the heads are wider together than the stream, as in Qwen3 and Gemma 3."""
        text = {"any": self.TEXT["one"][:3]}
        recording = fxfuse.record(make(), batches[:1])
        names = [f"model.layers.{n}.self_attn" for n in range(3)]
        effort, target = replace(self.ONE, pool=4, healed=4), Targets(kv_bytes=2 * 64)  # of three caches
        found = find_plan(recording, make(), batches, target, costs_of(recording), heal_on=text, effort=effort)

        maps = maps_alone(make(), Plan(linear=names), kinds(text, 0.2, list))
        for name in names:
            kl = fxfuse.evaluate(reference(make(), maps[name], [name]), batches, make()).kl
            assert found.edits[Plan(linear=[name])] == pytest.approx(kl, rel=1e-6)
        healed = [trial.healed for trial in found.trials if trial.plan.linear]
        assert healed and all(kl is not None and math.isfinite(kl) for kl in healed)

    def test_other_text_to_fit_on_measures_maps_anew_and_nothing_else(
        self, recorded: Recording, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state, measured = tmp_path / "state", list[Plan]()
        real = module.measure_changes

        def counting(wanted: Any, planned: Any, original: Any, given: Any, known: Any, *args: Any) -> Any:
            measured.extend(edit for edit in wanted if edit not in known.kl)
            return real(wanted, planned, original, given, known, *args)

        monkeypatch.setattr(module, "measure_changes", counting)
        self.search(recorded, batches, self.TEXT, resume=state)
        assert any(edit.drop for edit in measured)
        measured.clear()
        first = self.search(recorded, batches, self.TEXT, resume=state)
        self.search(recorded, batches, {}, resume=state)
        assert not measured
        other = self.search(recorded, batches, {"one": self.TEXT["other"]}, resume=state)
        assert measured and all(edit.linear for edit in measured)
        assert {edit: kl for edit, kl in other.edits.items() if edit.drop} == {
            edit: kl for edit, kl in first.edits.items() if edit.drop
        }


@pytest.mark.slow
def test_healing_takes_part_in_the_choice(recorded: Recording, batches: Batches) -> None:
    text = {"any": [{"input_ids": tokens(2, 60, seed=seed), "use_cache": False} for seed in range(10, 15)]}
    effort = Effort(pool=2, healed=2, patience=1, max_group=2)
    model = llama(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = find_plan(recorded, model, batches, LATENCY, costs_of(recorded), heal_on=text, effort=effort)

    assert all(trial.healed is not None for trial in found.trials)
    assert any(edit.linear for edit in found.edits)
    assert found.best.healed == min(trial.healed for trial in found.trials if trial.healed is not None)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
