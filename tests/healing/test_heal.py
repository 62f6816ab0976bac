from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fxfuse
from fxfuse import Plan, PlanError
from fxfuse.errors import HealError, NotFiniteError, OptionError, RecordError
from fxfuse.healing import fit as fitting
from fxfuse.healing.local import Training
from fxfuse.measure.evaluation import Metrics
from fxfuse.model.healed import healed_for
from tests.models.tiny import llama, planned, redraw, tokens

DROP = Plan(drop=["model.layers.1.self_attn"])


def trained(layers: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    """A Llama whose attentions matter less than its FFNs, as in a trained model."""
    model = llama(layers, dtype=dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.3
    return model


def text(count: int = 10, length: int = 24, start: int = 0) -> list[dict[str, object]]:
    return [{"input_ids": tokens(2, length, seed), "use_cache": False} for seed in range(start, start + count)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


class Mapped(nn.Module):
    """A Llama's attention as a linear map: its output projection, of what it is given."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.o_proj = attention.o_proj

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        return self.o_proj(hidden_states), None


def kl(model: Any, original: Any, plan: Plan, batches: list[dict[str, object]]) -> float:
    """Of the planned model, told by its own modules, to the original."""
    student = copy.deepcopy(model)
    for name in plan.linear:
        layer = student.get_submodule(name.removesuffix(".self_attn"))
        layer.self_attn = Mapped(layer.self_attn)
    return fxfuse.evaluate(planned(student, plan.drop, plan.parallel), batches, reference=original).kl or 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "plan",
    [
        DROP,
        Plan(linear=["model.layers.1.self_attn"]),
        Plan(drop=["model.layers.1.self_attn"], parallel=[["model.layers.0.mlp", "model.layers.1.mlp"]]),
        Plan(parallel=[["model.layers.0.self_attn", "model.layers.1.self_attn"],
                       ["model.layers.0.mlp", "model.layers.1.mlp"]]),
        Plan(parallel=[[["model.layers.0.self_attn", "model.layers.0.mlp"],
                        ["model.layers.1.self_attn", "model.layers.1.mlp"]]]),
    ],
    ids=["drop", "linear", "fusion", "layers", "blocks"],
)  # fmt: skip
def test_a_healed_model_is_nearer_to_the_original(plan: Plan, dtype: torch.dtype) -> None:
    model = trained(dtype=dtype)
    original, unseen = copy.deepcopy(model), text(6, start=100)
    healing = fxfuse.heal(model, plan, {"a": text(10), "b": text(10, start=50)})

    assert healing.share > 0
    assert all(each.after < each.before for each in healing.kl.values())
    assert kl(model, original, plan, unseen) < kl(original, original, plan, unseen)
    assert {n: (v.shape, v.dtype) for n, v in model.state_dict().items()} == {
        n: (v.shape, v.dtype) for n, v in original.state_dict().items()
    }


@pytest.mark.parametrize("method", ["local", ["fit", "local"]])
def test_training_brings_it_nearer_too(method: Any) -> None:
    model = trained()
    original, unseen = copy.deepcopy(model), text(6, start=100)
    healing = fxfuse.heal(model, DROP, text(20), method, training=Training(epochs=4, rate=1e-2))

    assert {each.method for each in healing.outcomes} == ({method} if isinstance(method, str) else set(method))
    assert healing.share > 0
    assert kl(model, original, DROP, unseen) < kl(original, original, DROP, unseen)
    before = original.state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"model.layers.1.mlp.gate_proj.weight", "model.layers.2.input_layernorm.weight"} <= changed
    assert not any(name.startswith(("model.embed", "model.layers.0", "model.norm", "lm_head")) for name in changed)


def test_when_the_time_is_over_the_steps_not_begun_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    before = weights(model)
    clock = itertools.count(0.0, 30.0)  # a look at it before each step, after one at the start
    monkeypatch.setattr("fxfuse.healing.heal.time.monotonic", lambda: next(clock))
    healing = fxfuse.heal(model, DROP, text(), minutes=1)

    assert [each.branches for each in healing.outcomes] == [("model.layers.1.mlp",), ("model.layers.2.self_attn",)]
    assert not torch.equal(model.state_dict()["model.layers.1.mlp.down_proj.weight"],
                           before["model.layers.1.mlp.down_proj.weight"])  # fmt: skip
    assert torch.equal(model.state_dict()["model.layers.2.mlp.down_proj.weight"],
                       before["model.layers.2.mlp.down_proj.weight"])  # fmt: skip


def test_text_of_its_own_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.healing.heal.OWN_TOKENS", 80 * 256)
    healing = fxfuse.heal(trained(), DROP, {"given": text(), "own": "self"})

    assert healing.kl.keys() == {"given", "own"} and healing.share > 0
    assert healing.tokens == (8 * 48 + 32 * 512, 2 * 48 + 8 * 512)


def test_what_it_says_is_what_the_model_does() -> None:
    model = trained()
    original, batches = copy.deepcopy(model), text(10)
    healing = fxfuse.heal(model, DROP, batches)

    held = [batch for n, batch in enumerate(batches) if n in (4, 9)]
    assert healing.kl[""].before == pytest.approx(kl(original, original, DROP, held))
    assert healing.kl[""].after == pytest.approx(kl(model, original, DROP, held))
    assert healing.tokens == (8 * 48, 2 * 48)
    assert "healed" in str(healing) and "text held out" in str(healing)


def test_a_model_with_biases_and_conv1d_heals() -> None:
    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).double().eval()
    redraw(model)
    original = copy.deepcopy(model)
    healing = fxfuse.heal(model, Plan(drop=["transformer.h.1.attn"]), text(12))

    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, original.state_dict()[name])
    }
    assert healing.share > 0 and healing.kl[""].after < healing.kl[""].before
    assert "transformer.h.1.mlp.c_proj.weight" in changed and "transformer.h.1.mlp.c_proj.bias" in changed
    assert not any("c_attn" in name or "c_fc" in name for name in changed)


def test_nothing_is_changed_where_nothing_gets_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "best_strength", lambda fitted, held: (1.0, torch.full_like(fitted.cross, -1.0)))
    model = trained()
    before = weights(model)
    healing = fxfuse.heal(model, DROP, text())

    assert healing.share == 0 and "nothing was changed" in str(healing)
    assert healing.kl[""].after == healing.kl[""].before
    assert_same_weights(model, before)


def test_what_heals_one_kind_of_text_and_hurts_another_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    before = weights(model)
    scores = itertools.chain([1.0, 1.0], itertools.cycle([0.1, 1.01]))  # unhealed, then with each share of the change

    def judged(*args: object, **kwargs: object) -> Metrics:
        return Metrics(1, 1, 1.0, (1.0, 1.0), kl=next(scores))

    monkeypatch.setattr("fxfuse.healing.judge.evaluate", judged)
    healing = fxfuse.heal(model, DROP, {"one": text(), "other": text(start=50)})

    assert healing.share == 0
    assert_same_weights(model, before)


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = trained(), trained()
    before = weights(broken)
    fxfuse.heal(whole, DROP, text())

    calls = 0
    best_strength = fitting.best_strength

    def interrupted(fitted: Any, held: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt
        return best_strength(fitted, held)

    with monkeypatch.context() as patched:
        patched.setattr(fitting, "best_strength", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fxfuse.heal(broken, DROP, text(), resume=tmp_path / "state")
    assert_same_weights(broken, before)
    assert len(os.listdir(tmp_path / "state" / "fit")) == 2

    calls = 0
    with monkeypatch.context() as patched:
        patched.setattr(fitting, "best_strength", interrupted)
        fxfuse.heal(broken, DROP, text(), resume=tmp_path / "state")
    assert calls == 1  # one of three sums was left
    assert_same_weights(broken, weights(whole))


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    model = trained()
    fxfuse.heal(copy.deepcopy(model), DROP, text(), resume=tmp_path)
    before = weights(model)

    for plan, batches, words in (
        (Plan(drop=["model.layers.2.self_attn"]), text(), "another plan"),
        (DROP, text(8), "another text"),
    ):
        with pytest.raises(HealError, match=words):
            fxfuse.heal(model, plan, batches, resume=tmp_path)
    with pytest.raises(HealError, match="another model"):
        fxfuse.heal(llama(3), DROP, text(), resume=tmp_path)
    (tmp_path / "fit" / "step-0000.safetensors").write_bytes(b"no")
    with pytest.raises(HealError, match="cannot be read"):
        fxfuse.heal(model, DROP, text(), resume=tmp_path)
    assert_same_weights(model, before)


def test_a_method_goes_on_only_from_what_those_before_it_found(tmp_path: Path) -> None:
    training = Training(epochs=1)
    fxfuse.heal(trained(), DROP, text(), "local", training=training, resume=tmp_path)
    model = trained()
    before = weights(model)

    with pytest.raises(HealError, match="another method"):
        fxfuse.heal(model, DROP, text(), ["fit", "local"], training=training, resume=tmp_path)
    assert_same_weights(model, before)


def test_weights_that_are_no_parameters_are_left_alone() -> None:
    model = trained()
    down = model.model.layers[1].mlp.down_proj
    frozen = down.weight.detach().clone()
    del down.weight
    down.register_buffer("weight", frozen)
    healing = fxfuse.heal(model, DROP, text())

    assert [each.branches[0] for each in healing.outcomes] == ["model.layers.2.self_attn", "model.layers.2.mlp"]
    assert torch.equal(down.weight, frozen)


BAD: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    (Plan(), text(), {}, HealError, "plan is empty"),
    (DROP, [], {}, HealError, "there are 0 batches"),
    (DROP, {"code": text(1), "prose": text()}, {}, HealError, "1 batches of the text 'code'"),
    (DROP, {}, {}, HealError, "no text was given"),
    (DROP, "corpus.txt", {}, HealError, "'corpus.txt' is no text"),
    (DROP, text()[0], {}, HealError, "a single batch"),
    (DROP, text(4, 4), {}, HealError, "24 tokens to fit to"),
    (DROP, [{"ids": tokens()}] * 4, {}, RecordError, "batch 0"),
    (Plan(drop=["model.layers.7.self_attn"]), text(), {}, PlanError, "model.layers.7.self_attn"),
    (DROP, text(), {"held_out": 0.0}, OptionError, "held_out"),
    (DROP, text(), {"block": 0}, OptionError, "block"),
    (DROP, text(), {"minutes": -1.0}, OptionError, "minutes"),
    (DROP, text(), {"method": "prayer"}, OptionError, "prayer"),
    ({"drop": []}, text(), {}, OptionError, "fxfuse.Plan"),
]


@pytest.mark.parametrize(("plan", "batches", "options", "error", "words"), BAD)
def test_bad_input_is_named_and_loses_nothing(
    plan: Any, batches: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = trained()
    before = weights(model)
    with pytest.raises(error, match=words):
        fxfuse.heal(model, plan, batches, **options)
    assert_same_weights(model, before)


def test_a_healed_model_carries_its_plan() -> None:
    model = trained()
    fxfuse.heal(model, DROP, text())

    assert healed_for(model) == DROP
    with pytest.raises(HealError, match="healed already"):
        fxfuse.heal(model, DROP, text())
    with pytest.raises(PlanError, match="was healed for a plan"):
        fxfuse.apply(model, Plan(drop=["model.layers.2.self_attn"]))
    fxfuse.apply(model, DROP, inner="eager")


def test_a_pruned_model_is_refused() -> None:
    model = fxfuse.prune(trained(), DROP)
    with pytest.raises(PlanError, match="heal the original first"):
        fxfuse.heal(model, DROP, text())


def test_nan_is_named_and_loses_nothing() -> None:
    model = trained()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(NotFiniteError, match="NaN"):
        fxfuse.heal(model, DROP, text())


def test_a_model_in_training_mode_and_compiled_stays_so() -> None:
    model = trained().train()
    compiled = torch.compile(model, backend="eager")
    fxfuse.heal(compiled, DROP, text())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
