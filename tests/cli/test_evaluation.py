"""``fxfuse eval`` on healed models and with tasks, as typed by a user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import fxfuse
from fxfuse import Plan
from fxfuse.data.loading import load
from fxfuse.model.healed import mark_healed
from tests.cli.test_main import run
from tests.cli.test_measure import SMALL, checkpoint

PLAN = Plan(drop=["model.layers.1.self_attn"], parallel=[["model.layers.1.mlp", "model.layers.2.mlp"]])
OTHER = Plan(drop=["model.layers.2.self_attn"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = checkpoint(tmp_path_factory.mktemp("original"), layers=3)
    PreTrainedTokenizerFast.from_pretrained(folder, eos_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def healed(original: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model, marked as healed, its last norm a little larger."""
    folder, loaded = tmp_path_factory.mktemp("healed"), load(original)
    mark_healed(loaded.model, PLAN)
    loaded.model.model.norm.weight.data.mul_(1.01)  # type: ignore[union-attr,operator]
    loaded.model.save_pretrained(folder)  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(folder)  # type: ignore[union-attr]
    return str(folder)


@pytest.fixture
def plan(tmp_path: Path) -> str:
    PLAN.save(tmp_path / "plan.json")
    return str(tmp_path / "plan.json")


@pytest.fixture
def other(tmp_path: Path) -> str:
    OTHER.save(tmp_path / "other.json")
    return str(tmp_path / "other.json")


def test_a_healed_model_runs_under_its_plan(capsys: pytest.CaptureFixture[str], healed: str, plan: str) -> None:
    code, alone, err = run(capsys, "eval", healed, "--json", *SMALL)
    assert code == 0, err
    _, given, _ = run(capsys, "eval", healed, "--plan", plan, "--json", *SMALL)
    applied = fxfuse.apply(load(healed).model, PLAN, inner="eager")
    from fxfuse.data.text import batches_of, python_documentation

    batches = batches_of(load(healed), python_documentation("hold out"), 8, 24)
    expected = fxfuse.evaluate(applied, batches, max_tokens=24)

    assert json.loads(alone) == json.loads(given) == json.loads(expected.to_json())


def test_original_planned_and_healed_are_compared(
    capsys: pytest.CaptureFixture[str], original: str, healed: str
) -> None:
    arguments = ("--tasks", "cloze,rewriting", "--task-limit", "3", *SMALL)
    code, out, err = run(capsys, "eval", original, "--healed", healed, *arguments)
    assert code == 0, err
    assert "planned:" in out and "healed:" in out and "healed - original" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("cloze", "rewriting"))] == [
        "cloze",
        "rewriting",
    ]

    _, out, _ = run(capsys, "eval", original, "--healed", healed, "--json", *arguments)
    found = json.loads(out)
    assert found["kl"] > 0 and found["healed"]["kl"] > 0 and found["kl"] != found["healed"]["kl"]
    assert [each["documents"] for each in found["tasks"] + found["reference_tasks"]] == [3] * 4


@pytest.mark.parametrize("command", ["eval", "explain", "bench", "record"])
def test_a_healed_model_and_another_plan_are_refused(
    capsys: pytest.CaptureFixture[str], healed: str, other: str, command: str, tmp_path: Path
) -> None:
    extra = ("-o", str(tmp_path / "r.safetensors")) if command == "record" else ()
    code, _, err = run(capsys, command, healed, "--plan", other, *extra)

    assert code == 1 and "healed for a plan" in err and "given another" in err


def test_what_does_not_go_together_is_refused(
    capsys: pytest.CaptureFixture[str], original: str, healed: str, other: str, tmp_path: Path
) -> None:
    refused = {
        ("eval", original, "--healed", original): "was healed for no plan",
        ("eval", original, "--healed", healed, "--plan", other): "given another",
        ("eval", healed, "--healed", healed): "has a plan of its own",
        ("eval", original, "--tasks", "clozes"): "no task 'clozes'; nearest: cloze",
        ("demo", healed, "-o", str(tmp_path)): "give the original model",
    }
    for arguments, words in refused.items():
        code, _, err = run(capsys, *arguments)
        assert code == 1 and words in err, err


def test_a_model_saved_with_a_plan_applied_needs_one_that_drops_as_much(
    capsys: pytest.CaptureFixture[str], original: str, other: str, tmp_path: Path
) -> None:
    loaded = load(original)
    fxfuse.apply(loaded.model, PLAN, inner="eager").save_pretrained(tmp_path)  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(tmp_path)  # type: ignore[union-attr]

    code, out, err = run(capsys, "eval", str(tmp_path), *SMALL)
    assert code == 0 and "perplexity" in out, err
    code, _, err = run(capsys, "eval", str(tmp_path), "--plan", other, *SMALL)
    assert code == 1 and "saved without 'model.layers.1.self_attn'" in err
