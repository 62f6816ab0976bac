from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.parallel import DataParallel
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import fxfuse
from fxfuse import Plan
from fxfuse.data.loading import load
from fxfuse.errors import PlanError
from fxfuse.model.healed import BUFFER, check, healed_for, kept, mark_healed
from tests.models.tiny import llama, planned, tokens

DROP = ("model.layers.1.self_attn", "model.layers.2.self_attn")
GROUP = ("model.layers.1.mlp", "model.layers.2.mlp")
PLAN = Plan(drop=DROP, parallel=[GROUP])
OTHER = Plan(drop=DROP[:1])


class Stack(nn.Module):
    """A home-made model: no config, and branches that are lists of FFNs."""

    def __init__(self) -> None:
        super().__init__()
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3)
        )

    def forward(self, h: Tensor) -> Tensor:
        for ffn in self.ffns:
            h = h + ffn(h)
        return h


HOME_MADE = Plan(drop=["ffns.1"])


def _json(plan: Plan) -> Any:
    return json.loads(plan.to_json())


def compiled(model: nn.Module, plan: Plan | None) -> Any:
    options: Any = {"inner": "eager"} | ({} if plan is None else {"plan": plan})
    return torch.compile(model, backend="ffnfuse", options=options)


@pytest.fixture
def healed() -> LlamaForCausalLM:
    model = llama()
    mark_healed(model, PLAN)
    return model


def test_a_mark_changes_nothing_but_the_config(healed: LlamaForCausalLM) -> None:
    original = llama()

    assert healed.state_dict().keys() == original.state_dict().keys()
    entry = {"plan": _json(PLAN), "digest": PLAN.digest, "healed": True}
    assert healed.config.to_dict() == original.config.to_dict() | {"fxfuse": entry}
    torch.testing.assert_close(healed(tokens()).logits, original(tokens()).logits, rtol=0, atol=0)


def test_the_plan_survives_save_and_load(healed: LlamaForCausalLM, tmp_path: Path) -> None:
    healed.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")

    for loaded in (again, AutoModel.from_pretrained(tmp_path), load(str(tmp_path / "again")).model):
        assert healed_for(loaded) == PLAN
    assert load(str(tmp_path)).plan == PLAN


def test_copies_are_marked_and_models_of_the_same_config_are_not() -> None:
    model = llama()
    sibling = LlamaForCausalLM(model.config)
    mark_healed(model, PLAN)

    assert healed_for(copy.deepcopy(model)) == PLAN
    assert healed_for(sibling) is None
    model.config.use_cache = False
    assert model.model.config is model.config and model.model.layers[0].self_attn.config is model.config


@pytest.mark.parametrize(
    "plan", [None, Plan(), OTHER, Plan(drop=DROP), Plan(drop=DROP, parallel=[GROUP[::-1], ["a", "b"]])]
)
def test_a_healed_model_runs_under_no_other_plan(healed: LlamaForCausalLM, plan: Plan | None) -> None:
    before = copy.deepcopy(healed.state_dict())
    words = "given none" if not plan else "given another"

    with pytest.raises(BackendCompilerFailed, match=f"PlanError: .*{words}"):
        compiled(healed, plan)(tokens())
    if plan is not None:
        with pytest.raises(PlanError, match=words):
            fxfuse.apply(healed, plan, inner="eager")
        with pytest.raises(PlanError, match=words):
            fxfuse.prune(healed, plan)
        with pytest.raises(PlanError, match=words):
            check(healed, plan)
    torch.testing.assert_close(healed.state_dict(), before, rtol=0, atol=0)


def test_a_healed_model_runs_under_its_plan(healed: LlamaForCausalLM) -> None:
    expected = planned(llama(), PLAN.drop, [GROUP])(tokens()).logits
    same = Plan(drop=DROP[::-1], parallel=[GROUP[::-1]])

    torch.testing.assert_close(compiled(healed, same)(tokens()).logits, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(compiled(fxfuse.prune(healed, PLAN), PLAN)(tokens()).logits, expected, rtol=0, atol=1e-8)
    applied = fxfuse.apply(healed, PLAN, inner="eager")
    torch.testing.assert_close(applied(tokens()).logits, expected, rtol=0, atol=1e-8)
    with pytest.raises(PlanError, match="given none"):
        fxfuse.apply(applied, Plan(), inner="eager")
    torch.testing.assert_close(applied(tokens()).logits, expected, rtol=0, atol=1e-8)


def test_parts_and_wrappers_of_a_healed_model_need_its_plan_by_their_own_names(healed: LlamaForCausalLM) -> None:
    inner = Plan(
        drop=[name.removeprefix("model.") for name in DROP], parallel=[[n.removeprefix("model.") for n in GROUP]]
    )
    outer = Plan(drop=[f"module.{name}" for name in DROP], parallel=[[f"module.{name}" for name in GROUP]])

    check(healed.model, inner)
    check(DataParallel(healed), outer)
    check(torch.compile(healed), PLAN)  # type: ignore[arg-type]  # an OptimizedModule
    for plan in (OTHER, Plan(), Plan(drop=[name.replace("layers.1", "layers.3") for name in DROP], parallel=[GROUP])):
        with pytest.raises(PlanError, match="healed for a plan"):
            check(healed.model, plan)
        with pytest.raises(PlanError, match="healed for a plan"):
            check(DataParallel(healed), plan)


def test_a_home_made_model_carries_its_plan_in_the_state_dict(tmp_path: Path) -> None:
    model = Stack().double()
    mark_healed(model, HOME_MADE)
    torch.save(model.half().state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt")

    assert healed_for(weights) == HOME_MADE
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{BUFFER}"'):
        Stack().load_state_dict(weights)
    again = Stack()
    mark_healed(again, HOME_MADE)
    again.load_state_dict(weights)
    assert healed_for(again) == HOME_MADE and kept(again) == HOME_MADE
    with pytest.raises(BackendCompilerFailed, match="PlanError: .*given none"):
        compiled(again, None)(torch.zeros(1, 8))
    compiled(again, HOME_MADE)(torch.zeros(1, 8))
    with pytest.raises(PlanError, match="given another"):
        fxfuse.apply(again, Plan(drop=["ffns.2"]), inner="eager", example=torch.zeros(1, 8))


def test_a_model_is_healed_for_one_plan_and_not_for_an_empty_one(healed: LlamaForCausalLM) -> None:
    mark_healed(healed, PLAN)
    with pytest.raises(PlanError, match="given another"):
        mark_healed(healed, OTHER)
    with pytest.raises(PlanError, match="empty plan"):
        mark_healed(llama(), Plan())
    assert healed_for(healed) == PLAN


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"plan": {"dorp": []}, "healed": True}, "dorp"),
        ({"plan": _json(PLAN), "healed": "true"}, "healed: Input should be a valid boolean"),
        (
            {"plan": _json(PLAN), "healed": True, "maps": "model.layers.1.self_attn"},
            "maps: Input should be a valid array",
        ),
        ({"plan": _json(PLAN), "healed": True, "narrowed": ["model.layers.1.mlp"]}, "another plan than was written"),
        ({"plan": _json(PLAN), "healed": True, "digest": OTHER.digest}, "another plan than was written"),
        ({"plan": _json(PLAN), "healed": True, "more": 1}, "more: Unexpected"),
        (["plan"], "is not what fxfuse writes there"),
        (object(), "is not what fxfuse writes there"),
    ],
)
def test_a_broken_mark_is_said(healed: LlamaForCausalLM, entry: object, words: str) -> None:
    healed.config.fxfuse = entry  # type: ignore[attr-defined]

    with pytest.raises(PlanError, match=f"'fxfuse' of the model's config.*{words}"):
        healed_for(healed)


def test_a_mark_from_before_there_was_a_digest_is_read(healed: LlamaForCausalLM) -> None:
    healed.config.fxfuse = {"plan": _json(PLAN), "healed": True}  # type: ignore[attr-defined]

    assert healed_for(healed) == PLAN


class TestApplied:
    """A plan that was applied is saved with the model, healed or not: what it dropped has no weights any more."""

    def test_it_is_saved_and_applied_again(self, tmp_path: Path) -> None:
        applied = fxfuse.apply(llama(), PLAN, inner="eager")
        applied.save_pretrained(tmp_path)  # type: ignore[operator]
        loaded = load(str(tmp_path))

        assert loaded.plan == PLAN and healed_for(loaded.model) is None
        again = fxfuse.apply(loaded.model, PLAN, inner="eager")
        torch.testing.assert_close(again(tokens()).logits, applied(tokens()).logits, rtol=0, atol=0)

    def test_of_a_healed_model_it_stays_healed(self, healed: LlamaForCausalLM, tmp_path: Path) -> None:
        fxfuse.apply(healed, PLAN, inner="eager").save_pretrained(tmp_path)  # type: ignore[operator]

        assert healed_for(load(str(tmp_path)).model) == PLAN

    def test_what_was_dropped_stays_dropped_when_groups_are_taken_back(self) -> None:
        model = fxfuse.apply(llama(), PLAN, inner="eager")
        fxfuse.apply(model, Plan(), inner="eager")

        assert kept(model) == Plan(drop=DROP)
        assert kept(fxfuse.prune(llama(), PLAN)) == Plan(drop=DROP)

    def test_a_plan_without_drops_can_be_taken_back_whole(self) -> None:
        model = fxfuse.apply(llama(), Plan(parallel=[GROUP]), inner="eager")
        assert kept(model) == Plan(parallel=[GROUP])
        fxfuse.apply(model, Plan(), inner="eager")

        assert kept(model) is None and "fxfuse" not in model.config.to_dict()  # type: ignore[operator,union-attr]

    def test_an_error_keeps_nothing(self) -> None:
        model = llama()
        with pytest.raises(PlanError):
            fxfuse.apply(model, Plan(drop=["model.norm"]), inner="eager")

        assert kept(model) is None
