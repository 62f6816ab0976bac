"""A narrowed FFN is healed as any other: the columns of its down projection that it keeps are fitted, or trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fxfuse
from fxfuse import Plan
from fxfuse.healing.choice import choose
from tests.healing.test_fit import batches, fitted
from tests.models.tiny import llama, redraw, tokens

UNITS = tuple(range(0, 40, 3))
NAME = "model.layers.1.mlp"
DOWN = f"{NAME}.down_proj.weight"


def hidden(model: Any, text: list[dict[str, object]]) -> tuple[Tensor, Tensor]:
    """What the down projection of layer 1 reads, and the stream after it: ``[tokens, ...]``."""
    seen: dict[str, list[Tensor]] = {"units": [], "stream": []}
    into = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen["units"].append(args[0]))
    out = model.model.layers[2].input_layernorm.register_forward_pre_hook(
        lambda _, args: seen["stream"].append(args[0])
    )
    with torch.no_grad():
        for batch in text:
            model(**batch)
    into.remove()
    out.remove()
    return torch.cat(seen["units"]).flatten(0, 1), torch.cat(seen["stream"]).flatten(0, 1)


def test_the_columns_that_are_kept_solve_the_ridge_regression_and_the_others_stay() -> None:
    model, text = llama(), batches()
    old = model.get_parameter(DOWN).detach().clone()

    weights, said = fitted(model, Plan(narrow={NAME: UNITS}), text)

    assert said[0].branches == (NAME,) and said[0].after < said[0].before
    kept = list(UNITS)
    others = [unit for unit in range(40) if unit not in UNITS]
    assert torch.equal(weights[DOWN][:, others], old[:, others])
    units, goal = hidden(model, text[:4])  # the last two are held out
    weight = 1 / goal.norm(dim=-1, keepdim=True)
    missing = units[:, others] @ old[:, others].T  # nothing before the FFN is edited
    rows = units[:, kept] * weight
    ridge = (said[0].strength * rows.square().sum(0).mean()).sqrt() * torch.eye(len(kept), dtype=torch.float64)
    wanted = torch.cat([missing * weight, torch.zeros(len(kept), 32, dtype=torch.float64)])
    change = torch.linalg.lstsq(torch.cat([rows, ridge]), wanted).solution.T
    torch.testing.assert_close(weights[DOWN][:, kept] - old[:, kept], change, rtol=1e-6, atol=1e-9)


def test_the_columns_of_a_transposed_projection_are_its_rows() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).double().eval()
    redraw(model)
    name = "transformer.h.0.mlp"
    down = f"{name}.c_proj.weight"

    weights, said = fitted(model, Plan(narrow={name: range(16)}), batches())

    assert said[0].after < said[0].before
    change = weights[down] - model.get_parameter(down)
    assert change[:16].any(1).all() and not change[16:].any()


@pytest.mark.parametrize("method", ["fit", "local", "distill"])
def test_every_method_brings_the_model_nearer_and_what_left_it_was_of_no_use(method: str) -> None:
    model = llama()
    original = copy.deepcopy(model)
    plan = Plan(narrow={NAME: UNITS, "model.layers.2.mlp": range(20)}, parallel=[[NAME, "model.layers.2.mlp"]])
    before = fxfuse.apply(copy.deepcopy(model), plan, inner="eager")

    fxfuse.heal(model, plan, batches(8), method=method, progress=False)

    applied = fxfuse.apply(copy.deepcopy(model), plan, inner="eager")
    ids = tokens(2, 24, 77)
    assert away(applied, original, ids) < away(before, original, ids)
    planned: Any = torch.compile(model, backend="ffnfuse", options={"plan": plan, "inner": "eager"})
    torch.testing.assert_close(applied(ids).logits, planned(ids).logits, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def away(model: Any, original: Any, ids: Tensor) -> float:
    wanted, given = (each(ids).logits.log_softmax(-1) for each in (original, model))
    return float(nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean"))


def test_a_narrowed_ffn_is_trained_because_it_is_edited() -> None:
    model: Any = llama()

    chosen = choose(model, Plan(narrow={NAME: UNITS}), batches(1)[0], "edited")

    own = {f"{NAME}.{each}.weight" for each in ("gate_proj", "up_proj", "down_proj")}
    assert {*chosen} == own | {"model.layers.1.post_attention_layernorm.weight"}
