"""``fxfuse simulate``."""

import json
from pathlib import Path

import pytest
from torch import Tensor, nn

import fxfuse
from fxfuse import Plan
from tests.cli.test_main import TINY, run
from tests.models.tiny import llama, tokens

LLAMA = f"{__name__}:tiny_llama"
PAPER = ["llama-405b", "nemotron-253b", "--tensor-parallel", "8", "--weights", "float8"]


def tiny_llama() -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    return llama(3), (), {"input_ids": tokens()}


def pruned_llama() -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    model = llama(3)
    names = [f"model.layers.{block}" for block in range(3)]
    group = [f"{name}.mlp" for name in names[1:]]
    plan = Plan(drop=[f"{names[2]}.self_attn"], linear=[f"{names[1]}.self_attn"], parallel=[group])
    return fxfuse.apply(model, plan, inner="eager"), (), {"input_ids": tokens()}


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    names = [f"model.layers.{block}" for block in range(3)]
    Plan(drop=[f"{names[2]}.self_attn"], parallel=[[f"{name}.mlp" for name in names[1:]]]).save(path)
    return path


def test_the_table_says_that_it_is_modelled_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "simulate", *PAPER, "--batch", "4", "--context", "100")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == ("modelled, ms of a decode step, NVIDIA H100 80GB SXM x 8, batch 4, context 100, float8 weights")
    assert [line.split()[0] for line in lines[2:4]] == ["llama-405b", "nemotron-253b"]
    assert lines[4] == "memory, GB on each GPU"


def test_terms_add_up_and_models_are_compared_with_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "simulate", *PAPER, "--json")
    found = json.loads(out)
    names = ("weights", "cache", "activations", "launches", "attention", "all-reduces")
    first, other = found["modelled"]
    for line in (first, other):
        assert sum(line[name] for name in names) == pytest.approx(line["ms"], abs=5e-3)
        assert line["tokens/s"] == pytest.approx(1e3 / line["ms"], rel=1e-2)
    assert other["speed-up"] == pytest.approx(first["ms"] / other["ms"], rel=1e-3)
    assert found["memory, bytes on each GPU"]["llama-405b"]["fits"]
    batch, context = found["curves"]
    assert (batch["sizes"][0], batch["sizes"][-1]) == (1, 256)
    assert all(curve["ms"]["llama-405b"][-1] > 1.05 * curve["ms"]["llama-405b"][0] for curve in (batch, context))
    assert batch["ms"]["llama-405b"][0] == pytest.approx(first["ms"], abs=1e-3)
    assert context["ms"]["llama-405b"][context["sizes"].index(2048)] == pytest.approx(first["ms"], abs=1e-3)


def test_a_users_model_as_it_is_and_under_a_plan(capsys: pytest.CaptureFixture[str], plan_file: Path) -> None:
    code, out, err = run(capsys, "simulate", LLAMA, "--plan", str(plan_file), "--json")
    assert code == 0, err
    before, after = json.loads(out)["modelled"]
    assert (before["model"], after["model"]) == (LLAMA, f"{LLAMA}, planned")
    assert before["kernels"] - after["kernels"] == 6 + 4  # an attention, and an FFN's
    assert after["speed-up"] > 1
    needs = json.loads(out)["memory, bytes on each GPU"]
    assert needs[f"{LLAMA}, planned"]["copied"] == 2 * 2 * 3 * 32 * 40


def test_a_model_that_needs_its_plan_is_priced_under_that_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "simulate", f"{__name__}:pruned_llama", "--json")
    assert code == 0, err
    (line,) = json.loads(out)["modelled"]
    assert line["model"].endswith(":pruned_llama, planned")
    # embedding, head's three; an attention of six, a linear map of two, an FFN and a wide one of four
    assert line["kernels"] == 4 + 6 + 2 + 4 + 4


def test_a_plan_of_a_released_model_is_priced_by_its_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan(drop=["model.layers.70.self_attn"]).save(path)
    _, out, _ = run(capsys, "simulate", "llama-70b", "--plan", str(path), "--json")
    assert [line["kernels"] for line in json.loads(out)["modelled"]] == [804, 804 - 6]
    code, _, err = run(capsys, "simulate", "nemotron-49b", "--plan", str(path))
    assert code == 1
    assert "nemotron-49b has no branch 'model.layers.70.self_attn'; nearest: " in err


def test_the_picture_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "simulate", *PAPER, "--plot", str(tmp_path / "latency.png"))
    assert code == 0, err
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run(capsys, "simulate", *PAPER, "--plot", str(tmp_path / "no" / "latency.png"))
    assert code == 1
    assert "no" in err


def test_what_cannot_be_priced_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["llama-405"], "there is no 'llama-405' here"),
        ([TINY], "unexpected keyword argument 'use_cache'"),
        (["llama-70b", "--tensor-parallel", "3"], "all-reduces for 2, 4, 8 GPUs, not for 3"),
        (["llama-70b", "--gpu", "a10", "--tensor-parallel", "8"], "NVIDIA A10, which has no NVLink"),
        (["llama-70b", "--gpu", "b300"], "no figures for a GPU 'b300'"),
    ):
        code, out, err = run(capsys, "simulate", *arguments)
        assert code == 1, arguments
        assert words in err
        assert out == ""
