"""Units that a narrowed FFN does not keep leave its modules, and the model goes on to be what the plan says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fxfuse
from fxfuse import Plan, PlanError
from fxfuse.data.loading import load
from fxfuse.errors import PruneError
from fxfuse.model.narrowing import narrowed_in
from tests.models.blocks import PackedSwiGLU, Stream, ready
from tests.models.blocks import vectors as rows
from tests.models.tiny import Tower, llama, redraw, silenced, tokens, vectors

UNITS = tuple(range(0, 40, 3))
MLPS = [f"model.layers.{layer}.mlp" for layer in range(4)]
PLAN = Plan(narrow={MLPS[1]: UNITS, MLPS[2]: range(5)})


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def test_the_weights_of_the_others_leave_and_names_stay() -> None:
    model = llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    assert fxfuse.prune(model, PLAN) is model

    mlp: Any = model.model.layers[1].mlp
    assert (mlp.gate_proj.out_features, mlp.up_proj.out_features, mlp.down_proj.in_features) == (14, 14, 14)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert torch.equal(after[f"{MLPS[1]}.up_proj.weight"], before[f"{MLPS[1]}.up_proj.weight"][list(UNITS)])
    assert torch.equal(after[f"{MLPS[1]}.down_proj.weight"], before[f"{MLPS[1]}.down_proj.weight"][:, list(UNITS)])
    smaller = [name for name in before if after[name].shape != before[name].shape]
    assert smaller == [f"{mlp}.{own}_proj.weight" for mlp in MLPS[1:3] for own in ("gate", "up", "down")]
    assert dict(narrowed_in(model)) == {MLPS[1]: UNITS, MLPS[2]: (0, 1, 2, 3, 4)}


def test_it_is_the_model_whose_other_units_are_zero_and_generates_as_that() -> None:
    model, ids = llama(), tokens(1, 9)
    wanted = silenced(model, PLAN)

    fxfuse.prune(model, PLAN)

    torch.testing.assert_close(logits(model, ids), logits(wanted, ids), rtol=1e-9, atol=1e-9)
    made, same = (m.generate(ids, max_new_tokens=6, do_sample=False) for m in (model, wanted))
    assert torch.equal(made, same)


def test_applied_in_a_group_it_is_one_wide_ffn() -> None:
    plan = Plan(drop=["model.layers.2.self_attn"], narrow=PLAN.narrow, parallel=[MLPS[1:3]])
    model, ids = llama(), tokens(1, 9)
    wanted = silenced(model, plan)

    fxfuse.apply(model, plan, inner="eager")

    torch.testing.assert_close(logits(model, ids), logits(wanted, ids), rtol=1e-9, atol=1e-9)
    assert model.get_parameter(f"{MLPS[2]}.gate_proj.weight").shape == (5, 32)
    fxfuse.apply(model, plan, inner="eager")  # once more: the units have left already
    torch.testing.assert_close(logits(model, ids), logits(wanted, ids), rtol=1e-9, atol=1e-9)


def test_a_packed_projection_and_one_that_is_transposed_keep_the_rows_of_both_halves() -> None:
    model = ready(Stream(PackedSwiGLU(bias=True), PackedSwiGLU()))
    twin = copy.deepcopy(model)
    fxfuse.prune(model, Plan(narrow={"layers.0.body": (1, 5, 6)}), rows())
    with torch.no_grad():
        down: Any = twin.layers[0].body.down
        down.weight[:, [unit for unit in range(12) if unit not in (1, 5, 6)]] = 0
        torch.testing.assert_close(model(rows()), twin(rows()), rtol=1e-9, atol=1e-9)
    assert model.layers[0].body.gate_up.bias.shape == (6,)

    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    gpt = GPT2LMHeadModel(config).double().eval()
    redraw(gpt)
    other = copy.deepcopy(gpt)
    fxfuse.prune(gpt, Plan(narrow={"transformer.h.1.mlp": range(7)}))
    with torch.no_grad():
        other.transformer.h[1].mlp.c_proj.weight[7:] = 0
    torch.testing.assert_close(logits(gpt, tokens(1, 9)), logits(other, tokens(1, 9)), rtol=1e-9, atol=1e-9)
    assert gpt.transformer.h[1].mlp.c_fc.nf == 7


def test_what_was_saved_is_loaded_with_the_units_that_it_has(tmp_path: Path) -> None:
    model, ids = llama(dtype=torch.float32), tokens(1, 9)
    fxfuse.apply(model, PLAN, inner="eager")
    model.save_pretrained(tmp_path)

    loaded = load(str(tmp_path))

    assert loaded.plan == PLAN
    assert torch.equal(logits(loaded.model, ids), logits(model, ids))
    fxfuse.apply(loaded.model, PLAN, inner="eager")
    with pytest.raises(PruneError, match="has kept 14 hidden units, and not those of the plan"):
        fxfuse.prune(loaded.model, Plan(narrow={MLPS[1]: range(14)}))


class Halved(nn.Module):
    """An FFN that knows how wide it is, and cannot do with less."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).split(12, -1)
        return self.down(nn.functional.silu(gate) * up)


def test_a_module_that_cannot_be_smaller_is_an_error_and_stays() -> None:
    model = ready(Stream(Halved(), Halved()))
    before, features = model.state_dict(), model.layers[0].body.gate_up.out_features

    with pytest.raises(PruneError, match=r"the model with layers\.0\.body narrowed"):
        fxfuse.prune(model, Plan(narrow={"layers.0.body": (1, 2)}), rows())

    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert model.layers[0].body.gate_up.out_features == features
    assert not narrowed_in(model)


@pytest.mark.parametrize(
    ("narrow", "error", "words"),
    [
        ({"layers.0.mlp": (0, 99)}, PlanError, "keeps unit 99, and the FFN has 12"),
        ({"layers.0.norm": (0,)}, PlanError, "'layers.0.norm' is no branch of the model's stream"),
        ({"layers.0.mpl": (0,)}, PruneError, "'layers.0.mpl' is no module of this model"),
    ],
)
def test_what_the_model_has_not_is_refused(narrow: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fxfuse.prune(Tower(), Plan(narrow=narrow), vectors(2, 3, 8))
