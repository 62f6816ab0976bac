"""Adapters of peft under a plan: whatever is done to them at run time, the next call knows it; merged ones fuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Plan
from fxfuse.ffn.adapter import REASON
from fxfuse.report.explanation import BranchInfo
from tests.models.ffns import FFNs
from tests.models.tiny import llama, planned, redraw, tokens, vectors

peft = pytest.importorskip("peft")

PLAN = Plan(parallel=[["layers.0.mlp", "layers.1.mlp"]])
X = vectors(2, 3, 8)
ALL = ["gate", "up", "down"]


def adapted(targets: list[str] = ALL, **settings: Any) -> Any:
    model = peft.get_peft_model(FFNs(), peft.LoraConfig(target_modules=targets, r=2, lora_alpha=4, **settings))
    model.double().eval()
    redraw(model)
    return model


def add(model: Any, name: str) -> None:
    model.add_adapter(name, peft.LoraConfig(target_modules=ALL, r=3))
    model.double().eval()
    redraw(model)


def weigh(model: Any, name: str, by: float) -> None:
    for module in model.modules():
        if name in getattr(module, "scaling", {}):
            module.scaling[name] = by


def edit(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 2.0


DONE: list[tuple[str, Callable[[Any], object]]] = [
    ("at first", lambda model: None),
    ("merged", lambda model: model.merge_adapter()),
    ("unmerged", lambda model: model.unmerge_adapter()),
    ("edited without a trace", edit),
    ("one more", lambda model: add(model, "two")),
    ("switched", lambda model: model.set_adapter("two")),
    ("both", lambda model: model.base_model.set_adapter(["default", "two"])),
    ("weighted", lambda model: weigh(model, "two", 0.7)),
    ("weighted again", lambda model: weigh(model, "two", -1.3)),
    ("both merged", lambda model: model.merge_adapter()),
    ("both unmerged", lambda model: model.unmerge_adapter()),
    ("disabled", lambda model: model.base_model.disable_adapter_layers()),
    ("enabled", lambda model: model.base_model.enable_adapter_layers()),
    ("one less", lambda model: (model.delete_adapter("two"), model.set_adapter("default"))),
]


@pytest.mark.parametrize("options", [{}, {"merge_gate_up": True}, {"weights": "share"}], ids=str)
@torch.no_grad()
def test_whatever_is_done_to_adapters_the_next_call_knows(options: dict[str, Any]) -> None:
    model = adapted()
    call = torch.compile(model, backend="ffnfuse", options={"plan": PLAN, "inner": "eager", **options})

    for what, do in DONE:
        do(model)
        expected = model.base_model.model.parallel(X)
        torch.testing.assert_close(call(X), expected, rtol=1e-8, atol=1e-8, msg=lambda m, what=what: f"{what}: {m}")


def member(model: nn.Module) -> BranchInfo:
    return fxfuse.explain(model, X, plan=PLAN).branches[0]


@pytest.mark.parametrize("targets", [ALL, ["gate"], ["up", "down"], ["down"]], ids="+".join)
def test_an_adapter_that_is_not_merged_is_the_reason_and_a_merged_one_fuses(targets: list[str]) -> None:
    model = adapted(targets)

    found = member(model)
    assert (found.name, found.fused, found.reason) == ("layers.0.mlp", "", REASON)
    with torch.no_grad():
        model.merge_adapter()
    assert member(model).fused == "wide"


def test_several_adapters_at_once_are_the_same_reason() -> None:
    model = adapted()
    add(model, "two")
    model.base_model.set_adapter(["default", "two"])

    assert member(model).reason == REASON


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_trained_gets_its_gradient(merged: bool) -> None:
    model = adapted(lora_dropout=0.0)
    if merged:
        with torch.no_grad():
            model.merge_adapter()
        model.base_model.model.requires_grad_()
    call = torch.compile(model.train(), backend="ffnfuse", options={"plan": PLAN, "inner": "aot_eager"})
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad and not merged}
    trained = trained or {name: each for name, each in model.named_parameters() if "base_layer" in name}

    got = torch.autograd.grad(call(X).square().sum(), [*trained.values()])
    expected = torch.autograd.grad(model.base_model.model.parallel(X).square().sum(), [*trained.values()])
    for name, one, two in zip(trained, got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_training_steps_are_seen() -> None:
    model = adapted()
    call = torch.compile(model, backend="ffnfuse", options={"plan": PLAN, "inner": "aot_eager"})
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)

    losses = list[float]()
    for _ in range(3):
        loss = call(X).square().mean()
        torch.testing.assert_close(loss, model.base_model.model.parallel(X).square().mean(), rtol=1e-8, atol=1e-8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@torch.no_grad()
def test_adapters_of_attentions_leave_the_ffns_wide() -> None:
    drop, group, ids = ["model.layers.2.self_attn"], [["model.layers.1.mlp", "model.layers.2.mlp"]], tokens()
    plan = Plan(drop=drop, parallel=group)
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)).double().eval()
    redraw(model)

    explained = fxfuse.explain(model, input_ids=ids, use_cache=False, plan=plan)
    assert [each.name for each in explained.branches if each.fused == "wide"] == group[0]
    call = torch.compile(model, backend="ffnfuse", options={"plan": plan, "inner": "eager"})
    for _ in range(2):
        expected = planned(model.base_model.model, drop, group)(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(call(input_ids=ids, use_cache=False).logits, expected, rtol=1e-8, atol=1e-8)
        edit(model)
