from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from fxfuse import Plan
from fxfuse.errors import FxfuseError, HealError, NotFiniteError, OptionError, PlanError
from fxfuse.healing import teacher
from fxfuse.healing.choice import choose
from fxfuse.healing.distill import Distilled, distill
from fxfuse.healing.stages import Stage
from fxfuse.model.healed import BUFFER
from tests.models.language import EDITS, VOCABULARY, Language, language, sentences
from tests.models.tiny import llama, tokens

PLAN = Plan(**EDITS)


def trained(model: nn.Module, batches: Any = None, plan: Plan = PLAN, **options: Any) -> Distilled:
    """A short run, uncompiled."""
    return distill(model, plan, batches, **({"inner": "eager", "lr": 3e-3, "use_cpu": True} | options))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    after = model.state_dict()
    assert after.keys() - {BUFFER} == before.keys()  # a healed model carries its plan
    assert all((after[name].shape, after[name].dtype) == (old.shape, old.dtype) for name, old in before.items())
    return {name for name, old in before.items() if not torch.equal(after[name], old)}


class Interrupt(TrainerCallback):
    """Ctrl-C after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class TestLoss:
    def test_the_first_is_that_of_an_independent_reference(self) -> None:
        model = language()
        (batch,) = sentences(1, batch=3)
        ids = batch["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, 4:] = mask[1, :2] = 0
        labels = ids.masked_fill(ids == int(ids[2, 3]), -100)
        with torch.no_grad():
            own, other = model.hidden(ids), model.planned_hidden(ids)
            p, q = model.head(own).log_softmax(-1), model.head(other).log_softmax(-1)
        losses = [
            float((p[row, t].exp() * (p[row, t] - q[row, t])).sum())
            + 0.5 * (1 - float(F.cosine_similarity(own[row, t], other[row, t], dim=-1)))
            - 0.25 * float(q[row, t, ids[row, t + 1]])
            for row in range(3)
            for t in range(5)
            if mask[row, t] and mask[row, t + 1] and labels[row, t + 1] != -100
        ]
        assert 0 < len(losses) < 12

        given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        found = trained(model, [given], steps=1, cosine=0.5, lm=0.25)

        assert found.head == "head"
        assert found.stages[0].losses[0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)  # logged in float32

    def test_a_step_of_two_batches_is_a_step_of_both_in_one(self) -> None:
        batches = sentences(2)
        batches[0]["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
        batches[1]["attention_mask"] = torch.ones(2, 6, dtype=torch.int64)
        both = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        one, other = language(), language()
        a = trained(one, batches, steps=1, gradient_accumulation_steps=2)
        b = trained(other, [both], steps=1)
        assert a.stages[0].losses == pytest.approx(b.stages[0].losses, rel=1e-5)
        assert_alike(one, other, 1e-9)

    def test_without_a_module_as_head_only_logits_are_compared(self) -> None:
        class Tied(Language):
            def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
                return F.linear(self.hidden(input_ids), self.embed.weight)

        model = Tied().double().eval()
        found = trained(model, sentences(2), train="ffn", steps=1)
        assert not found.head and "no hidden states" in str(found)
        with pytest.raises(HealError, match="cosine=1"):
            trained(Tied().double().eval(), sentences(2), steps=1, cosine=1.0)


def assert_alike(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=name)


class TestTraining:
    @pytest.mark.slow
    def test_a_llama_without_an_attention_comes_nearer_to_what_it_was(self) -> None:
        model = llama(3)
        before = weights(model)
        plan = Plan(drop=["model.layers.1.self_attn"])
        batches = [{"input_ids": tokens(8, 12, seed=seed)} for seed in range(40)]
        held_out = [{"input_ids": tokens(8, 12, seed=1000 + seed)} for seed in range(2)]

        found = trained(model, batches, plan, held_out=held_out, lr=1e-2)

        losses = found.stages[0].losses
        assert len(losses) == 40 and sum(losses[-8:]) < 0.8 * sum(losses[:8])
        assert found.kept and found.kl is not None and found.kl[1] < 0.9 * found.kl[0]
        edited = {name for name in before if name.startswith(("model.layers.0.mlp.", "model.layers.1.mlp."))}
        edited |= {f"model.layers.{layer}.post_attention_layernorm.weight" for layer in (0, 1)}
        assert changed(model, before) == edited == set(found.trained)

    def test_the_teacher_stays_as_it_is_until_the_end(self) -> None:
        model = language()
        before = weights(model)
        model.train()
        flags = [parameter.requires_grad_(False) for parameter in model.parameters()]
        seen: list[set[str]] = []

        class Look(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                seen.append(changed(model, before))

        trained(model, sentences(3), train="all", callbacks=[Look()])

        assert seen == [set()] * 3
        assert changed(model, before) == {name for name in before if ".1.attn" not in name}
        assert model.training and not any(parameter.requires_grad for parameter in flags)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_model_that_came_no_nearer_keeps_its_weights(self) -> None:
        model = language()
        before = weights(model)
        found = trained(model, sentences(2), steps=3, lr=3.0, held_out=sentences(2, seed=9))
        assert not found.kept and not changed(model, before) and "nothing was changed" in str(found)

    @pytest.mark.slow
    def test_stages_follow_each_other_each_with_its_text_and_budget(self) -> None:
        model = language()
        stages = [
            Stage(sentences(8, length=4), steps=3),
            Stage(iter(sentences(50, length=8)), tokens=50, lr=1e-3),
            Stage(sentences(2, length=6), minutes=1e-9),
        ]
        found = trained(model, stages=stages)
        assert [run.steps for run in found.stages] == [3, 4, 1]  # 14 tokens a batch: 50 take 4

    @pytest.mark.slow
    def test_adapters_are_merged(self) -> None:
        model = language()
        before = weights(model)
        layout = [(name, type(module)) for name, module in model.named_modules()]
        found = trained(
            model, sentences(12, batch=8), train="lora", lr=2e-2, lora={"r": 4}, held_out=sentences(2, seed=9)
        )

        matrices = {name for name in before if name.startswith("layers.") and before[name].dim() == 2}
        assert changed(model, before) == {name for name in matrices if ".1.attn" not in name}
        assert [(name, type(module)) for name, module in model.named_modules()] == layout
        assert found.kl is not None and found.kl[1] < found.kl[0]
        for name in found.trained:
            assert torch.linalg.matrix_rank(model.get_parameter(name) - before[name], rtol=1e-6) <= 4


class TestTopK:
    def test_of_the_whole_vocabulary_is_live(self, tmp_path: Path) -> None:
        one, other = language(), language()
        a = trained(one, sentences(3), top_k=VOCABULARY, folder=tmp_path)
        b = trained(other, sentences(3), cosine=0.0)
        assert a.stages[0].losses == pytest.approx(b.stages[0].losses, rel=1e-6)
        assert_alike(one, other, 1e-9)

    @pytest.mark.slow
    def test_the_teacher_is_asked_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        batches = sentences(4)
        asked: list[int] = []
        real = teacher.logits_now

        def counting(model: nn.Module, number: int, batch: Any) -> Tensor:
            asked.append(number)
            return real(model, number, batch)

        monkeypatch.setattr(teacher, "logits_now", counting)
        with pytest.raises(KeyboardInterrupt):
            trained(language(), batches, top_k=3, folder=tmp_path, callbacks=[Interrupt(1)])
        assert asked == [0, 1, 2, 3]
        files = {file: file.stat().st_mtime_ns for file in (tmp_path / "teacher").iterdir()}
        trained(language(), batches, top_k=3, folder=tmp_path)
        assert asked == [0, 1, 2, 3]
        assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "teacher").iterdir()}

    def test_what_a_damaged_file_holds_is_not_believed(self, tmp_path: Path) -> None:
        trained(language(), sentences(2), top_k=3, folder=tmp_path)
        shutil.rmtree(tmp_path / "stage-0")
        for file in (tmp_path / "teacher").iterdir():
            file.write_bytes(file.read_bytes()[:50])
        with pytest.raises(HealError, match="cannot be read"):
            trained(language(), sentences(2), top_k=3, folder=tmp_path)

    def test_what_it_needs_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="folder"):
            trained(language(), sentences(2), top_k=3)
        with pytest.raises(OptionError, match="read but once"):
            trained(language(), iter(sentences(2)), steps=1, top_k=3, folder=tmp_path)
        with pytest.raises(HealError, match="vocabulary of 11"):
            trained(language(), sentences(2), top_k=12, folder=tmp_path / "other")
        with pytest.raises(OptionError, match="cosine"):
            trained(language(), sentences(2), top_k=3, cosine=1.0, folder=tmp_path)


class TestInterruption:
    @pytest.mark.slow
    @pytest.mark.parametrize("train", ["edited", "lora"])
    def test_a_run_goes_on_to_the_same_weights(self, tmp_path: Path, train: Any) -> None:
        def stages() -> list[Stage]:
            return [Stage(sentences(4)), Stage(iter(sentences(6, seed=5)), steps=6)]

        def run(model: nn.Module, folder: Path | None, *callbacks: TrainerCallback) -> Distilled:
            torch.manual_seed(0)  # of which adapters are drawn
            return trained(model, stages=stages(), train=train, folder=folder, save_steps=2, callbacks=callbacks)

        whole, model = language(), language()
        expected = run(whole, None)
        before = weights(model)
        for step in (3, 5):  # the second time in both stages: the first has passed its fifth step never
            with pytest.raises(KeyboardInterrupt):
                run(model, tmp_path, Interrupt(step))
            assert not changed(model, before)
        found = run(model, tmp_path)

        assert_alike(model, whole, 1e-9)
        assert [r.losses for r in found.stages] == [pytest.approx(r.losses, rel=1e-5) for r in expected.stages]

    def test_a_folder_of_another_run_is_refused(self, tmp_path: Path) -> None:
        trained(language(), sentences(2), folder=tmp_path)
        with pytest.raises(HealError, match="another model"):
            trained(language(seed=1), sentences(2), folder=tmp_path)
        with pytest.raises(HealError, match="another text"):
            trained(language(), sentences(2, seed=1), folder=tmp_path)
        with pytest.raises(HealError, match="another settings"):
            trained(language(), sentences(2), folder=tmp_path, lm=1.0)
        assert json.loads((tmp_path / "run.json").read_text())["plan"]["drop"] == ["layers.1.attn"]

    @pytest.mark.slow
    def test_a_run_that_ended_as_it_was_killed_does_not_train_on(self, tmp_path: Path) -> None:
        whole, model = language(), language()
        for _ in range(2):
            found = trained(whole, iter(sentences(9)), steps=3, folder=tmp_path, save_steps=1)
            whole, model = model, whole
            (tmp_path / "stage-0" / "done.safetensors").unlink()
        assert found.stages[0].steps == 3
        assert_alike(model, whole, 1e-9)

    def test_a_checkpoint_cut_short_is_passed_over(self, tmp_path: Path) -> None:
        whole, model = language(), language()
        trained(whole, sentences(4))
        with pytest.raises(KeyboardInterrupt):
            trained(model, sentences(4), folder=tmp_path, save_steps=1, callbacks=[Interrupt(2)])
        (tmp_path / "stage-0" / "checkpoint-2" / "trainer_state.json").write_text('{"glo')
        trained(model, sentences(4), folder=tmp_path, save_steps=1)
        assert_alike(model, whole, 1e-9)


class TestErrors:
    @pytest.mark.parametrize(
        ("batches", "options", "error", "words"),
        [
            ([], {}, HealError, "no text"),
            (iter([]), {"steps": 1}, HealError, "no text"),
            ([{"input_ids": torch.zeros(2, 1, dtype=torch.int64)}], {}, HealError, "at least two tokens"),
            (sentences(3), {"gradient_accumulation_steps": 4}, HealError, "takes 4 of them, about 40 tokens"),
            (iter(sentences(3)), {}, OptionError, "stream without an end"),
            (sentences(3), {"steps": 0}, OptionError, "steps"),
            (sentences(3), {"lr": -1.0}, OptionError, "lr"),
            (sentences(3), {"max_steps": 3}, OptionError, "give steps"),
            (sentences(3), {"stepz": 3}, OptionError, "stepz"),
            (sentences(3), {"fsdp": True}, OptionError, "there is one: start more, as by torchrun"),
            (None, {}, OptionError, "either batches, or stages"),
            (None, {"stages": [Stage(sentences(3))], "steps": 3}, OptionError, "budget of its own"),
            (sentences(3), {"plan": Plan()}, HealError, "empty"),
            (sentences(3), {"plan": Plan(drop=["layers.7.attn"])}, PlanError, "layers.7.attn"),
            (sentences(3), {"plan": Plan(parallel=[["a.mlp", "b.mlp"]])}, PlanError, "a.mlp"),
            ([{"input_ids": torch.full((2, 4), 99)}], {}, FxfuseError, "index out of range"),
        ],
    )
    def test_is_told_and_nothing_is_lost(
        self, batches: Any, options: dict[str, Any], error: type[Exception], words: str
    ) -> None:
        model = language()
        before = weights(model)
        with pytest.raises(error, match=words):
            trained(model, batches, **options)
        assert not changed(model, before)

    def test_a_loss_that_is_no_number(self) -> None:
        model = language()
        before = weights(model)
        with pytest.raises(NotFiniteError, match="as it was"):
            trained(model, sentences(3), lr=1e200, steps=3, max_grad_norm=1e9)
        assert not changed(model, before)

    def test_weights_that_are_no_numbers(self) -> None:
        class Poison(TrainerCallback):
            def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)

        model = language()
        before = weights(model)
        with pytest.raises(NotFiniteError, match=r"layers.0.mlp.*as it was"):
            trained(model, sentences(1), callbacks=[Poison()])
        assert not changed(model, before)

    def test_a_model_that_was_pruned_cannot_teach(self) -> None:
        import fxfuse

        model = llama(2)
        fxfuse.apply(model, Plan(drop=["model.layers.1.self_attn"]), inner="eager")
        with pytest.raises(HealError, match="give the original"):
            trained(model, [{"input_ids": tokens()}], Plan(drop=["model.layers.1.self_attn"]))


class TestChoice:
    @pytest.mark.parametrize(
        ("train", "wanted"),
        [
            ("ffn", lambda name: ".mlp" in name),
            ("edited", lambda name: name.startswith(("layers.0.mlp", "layers.1.mlp"))),
            ("all", lambda name: not name.startswith("layers.1.attn")),
            ("lora", lambda name: name.startswith("layers.") and "norm" not in name and ".1.attn" not in name),
        ],
    )
    def test_is_by_branch(self, train: Any, wanted: Callable[[str], bool]) -> None:
        model = language(layers=3)
        plan = Plan(drop=["layers.1.attn"])
        chosen = choose(model, plan, sentences(1)[0], train)
        assert chosen == tuple(name for name, _ in model.named_parameters() if wanted(name))
