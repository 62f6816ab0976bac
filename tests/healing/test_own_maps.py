"""Attentions whose output projection has another shape than the linear map that takes their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

import fxfuse
from fxfuse import Plan, PlanError
from fxfuse.data.loading import load
from fxfuse.errors import LoadError
from fxfuse.healing.alone import maps_alone, own_maps
from fxfuse.healing.course import Distillation
from fxfuse.healing.distill import distill
from fxfuse.healing.fit import fit_step
from fxfuse.healing.local import Training
from fxfuse.healing.mapped import mapped
from fxfuse.healing.methods import Patient, samples_of
from fxfuse.healing.pair import pairs
from fxfuse.healing.steps import Sample, front_to_back
from fxfuse.healing.text import kinds
from fxfuse.model.healed import healed_for
from fxfuse.model.stand_ins import MadeLinear
from tests.healing.test_heal import text, weights
from tests.models.checks import assert_exact
from tests.models.tiny import redraw

NAMES = ["model.layers.1.self_attn"]
PLAN = Plan(linear=NAMES)
CPU = {"use_cpu": True}

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "head_dim": 16}
SIZES |= {"num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 64}
SIZES |= {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


def qwen3(dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """Heads of 64 features together on a stream of 32."""
    return _ready(Qwen3ForCausalLM(Qwen3Config(**SIZES, **more)), dtype)


def gemma3(dtype: torch.dtype = torch.float64) -> Any:
    """The same, and norms of what the branches add."""
    kinds = ["full_attention"] * 3
    return _ready(Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=kinds)), dtype)


def _ready(model: Any, dtype: torch.dtype) -> Any:
    model = model.to(dtype).eval()
    redraw(model)
    return model


class Mapped(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        return F.linear(hidden_states, self.weight, self.bias), None


def reference(model: Any, values: Mapping[str, Tensor], names: Sequence[str] = NAMES) -> Any:
    """The model with ``values``, and of those attentions that have a map there just that; told by modules alone."""
    made = copy.deepcopy(model)
    for name in names:
        layer = made.get_submodule(name.removesuffix(".self_attn"))
        layer.self_attn = Mapped(values[f"{name}.linear.weight"], values.get(f"{name}.linear.bias"))
    made.load_state_dict({k: v for k, v in values.items() if ".self_attn.linear." not in k}, strict=False)
    return made


def kl(model: Any, original: Any) -> float:
    return fxfuse.evaluate(model, text(6, start=100), reference=original).kl or 0.0


def silent(original: Any) -> Any:
    values = weights(original)
    return reference(original, values | {f"{name}.linear.weight": torch.zeros(32, 32).double() for name in NAMES})


@pytest.mark.parametrize("make", [qwen3, gemma3])
@pytest.mark.parametrize("method", ["fit", "local", "distill"])
def test_the_map_is_healed_and_the_model_has_it(make: Any, method: Any) -> None:
    model = make()
    original = copy.deepcopy(model)
    healing = fxfuse.heal(
        model,
        PLAN,
        {"a": text(12), "b": text(12, start=50)},
        method,
        training=Training(epochs=3, rate=3e-2),
        distillation=Distillation(steps=40, lr=1e-2, inner="eager", trainer=CPU),
    )

    assert healing.share > 0 and isinstance(model.get_submodule(NAMES[0]), MadeLinear)
    assert model.get_submodule(NAMES[0]).linear.weight.abs().max() > 0
    assert healed_for(model) == PLAN
    healed = reference(original, weights(model))
    assert kl(healed, original) < 0.9 * kl(silent(original), original)
    fxfuse.apply(model, PLAN, inner="eager", strict=True)
    ids: Any = text(1, start=7)[0]
    torch.testing.assert_close(model(**ids).logits, healed(**ids).logits, rtol=0, atol=1e-8)


def test_behind_a_norm_the_map_is_fitted_to_what_the_projection_gave() -> None:
    """Over one token an attention is a linear map of its values: it is recovered, up to the rounding of the ridge."""
    model = gemma3()
    original = copy.deepcopy(model)
    batches = [{**batch, "input_ids": batch["input_ids"].reshape(-1, 1)} for batch in text(10)]  # type: ignore[union-attr]
    with pytest.raises(Exception, match="no token"):  # a text of single tokens is judged by nobody
        fxfuse.heal(model, PLAN, batches)

    both = mapped(model, PLAN, batches[0])
    made = pairs(model, PLAN, batches, planned=both.model)
    found = front_to_back([Sample(pair, "", n < 2) for n, pair in enumerate(made)], partial(fit_step, block=4096))

    attention = original.get_submodule(NAMES[0])
    values = attention.v_proj.weight.unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1)
    wanted = attention.o_proj.weight @ values
    torch.testing.assert_close(found[f"{NAMES[0]}.linear.weight"], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [qwen3, gemma3])
def test_each_fitted_alone_is_what_heal_begins_with(make: Any) -> None:
    names = [f"model.layers.{n}.self_attn" for n in range(3)]
    model = make()
    before = weights(model)
    batches = {"a": text(12)}

    found = maps_alone(model, Plan(linear=names), kinds(batches, 0.25, list))

    assert list(found) == names and list(own_maps(found)) == names
    for name in names:
        alone, plan = make(), Plan(linear=[name])
        both = mapped(alone, plan, batches["a"][0])
        samples = samples_of(Patient(alone, both, plan, tuple(kinds(batches, 0.25, list))), "sums", {})
        for sample in samples:
            sample.pair.reach()
        first, _ = fit_step(samples, 4096)
        assert samples[0].pair.step.branches == (name,)
        assert_exact(list(found[name].values()), list(first.values()))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_methods_go_on_from_each_other_and_the_first_attention_goes_on_counting() -> None:
    model = qwen3(attention_bias=True)
    plan = Plan(linear=["model.layers.0.self_attn"], drop=["model.layers.2.self_attn"])
    healing = fxfuse.heal(
        model,
        plan,
        text(20),
        ["fit", "distill"],
        distillation=Distillation(steps=20, lr=3e-3, inner="eager", trainer=CPU),
    )

    assert healing.verdicts[0].share > 0
    assert [verdict.kl[""].after <= verdict.kl[""].before for verdict in healing.verdicts] == [True, True]
    assert model.get_submodule("model.layers.0.self_attn").linear.bias.abs().max() > 0
    fxfuse.apply(model, plan, inner="eager", strict=True)
    held = [batch for n, batch in enumerate(text(20)) if n % 5 == 4]
    original = qwen3(attention_bias=True)
    assert fxfuse.evaluate(model, held, reference=original).kl == pytest.approx(healing.kl[""].after)


def test_nothing_kept_leaves_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen3()
    before = weights(model)
    monkeypatch.setattr("fxfuse.healing.judge.SHARES", (-1.0,))
    healing = fxfuse.heal(model, PLAN, text())

    assert healing.share == 0
    assert model.state_dict().keys() == before.keys() and healed_for(model) is None


def test_an_interruption_takes_the_map_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen3()
    before = weights(model)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxfuse.healing.commit.mark_healed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxfuse.heal(model, PLAN, text())
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_distill_knows_them_too() -> None:
    model = qwen3()
    original = copy.deepcopy(model)
    made = distill(model, PLAN, text(20), lr=1e-2, inner="eager", held_out=text(4, start=90), use_cpu=True)

    assert made.kept and f"{NAMES[0]}.linear.weight" in made.trained
    assert kl(reference(original, weights(model)), original) < kl(silent(original), original)


@pytest.mark.parametrize("make", [qwen3, gemma3])
def test_a_checkpoint_holds_them(make: Any, tmp_path: Path) -> None:
    model = make(torch.float32)
    healing = fxfuse.heal(model, PLAN, text(20))
    assert healing.share > 0
    ids: Any = text(1, start=7)[0]
    wanted = model(**ids).logits
    model.save_pretrained(tmp_path)

    loaded = load(str(tmp_path))
    assert loaded.plan == PLAN
    made = fxfuse.apply(loaded.model, PLAN, inner="eager", strict=True)
    torch.testing.assert_close(made(**ids).logits, wanted)

    bare = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(PlanError, match=r"which from_pretrained does not load: load the folder by fxfuse\.data"):
        fxfuse.apply(bare, PLAN)


def test_a_checkpoint_without_their_weights_is_refused(tmp_path: Path) -> None:
    model = qwen3(torch.float32)
    assert fxfuse.heal(model, PLAN, text(20)).share > 0
    values = {name: value for name, value in model.state_dict().items() if ".linear." not in name}
    model.save_pretrained(tmp_path, state_dict=values)

    with pytest.raises(LoadError, match=r"lacks 'model\.layers\.1\.self_attn\.linear\.weight'"):
        load(str(tmp_path))
