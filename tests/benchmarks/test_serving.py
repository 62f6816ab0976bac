from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import fxfuse
from benchmarks.serving.__main__ import main
from tests.exporting.families import tiny
from tests.models.engines import install_fake_vllm


def made(folder: Path, *more: str, python: str = sys.executable) -> dict[str, Any]:
    """The file of a run that was asked for two kinds, two modes and ``more``."""
    own = ["--model", str(folder / "original"), "--plan", str(folder / "plan.json"), "--python", python]
    main([*own, "--prompt", "6", "--tokens", "2", "--rounds", "2", "--json", str(folder / "rows.json"), *more])
    held: dict[str, Any] = json.loads((folder / "rows.json").read_text())
    return held


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install_fake_vllm(tmp_path, monkeypatch)
    tiny("llama").save_pretrained(tmp_path / "original")
    pair = [["model.layers.1.self_attn", "model.layers.2.self_attn"], ["model.layers.1.mlp", "model.layers.2.mlp"]]
    fxfuse.Plan(parallel=pair).save(tmp_path / "plan.json")
    return tmp_path


def test_one_command_makes_all_rows_and_goes_on_with_those_that_are_there(folder: Path) -> None:
    first = made(folder, "--kinds", "transformers", "--modes", "eager", "--batches", "1")["rows"]
    held = made(folder, "--batches", "1", "3")

    assert held["rows"][: len(first)] == first
    assert [(row["kind"], row["mode"], row["batch"]) for row in held["rows"][::2]] == [
        ("transformers", "eager", 1),
        ("native", "eager", 1),
        ("native", "eager", 3),
        ("native", "compiled", 1),
        ("native", "compiled", 3),
        ("transformers", "eager", 3),
        ("transformers", "compiled", 1),
        ("transformers", "compiled", 3),
    ]
    assert {row["what"] for row in held["rows"]} == {"first token", "next token"}
    for row in held["rows"]:
        told = "own" in row["ms"]
        assert told == (row["kind"] == "transformers")  # a layer pair has no native form, and the file says why
        assert row["engines"]["original"].startswith(f"vLLM 1, {'auto' if not told else 'transformers'} {row['mode']}")
    assert "side by side" in held["refused"]["native"]["own"]

    assert made(folder, "--batches", "1", "3", python="/no/python") == held


def test_rows_of_other_settings_are_not_mixed(folder: Path) -> None:
    made(folder, "--kinds", "native", "--modes", "eager", "--batches", "1")

    with pytest.raises(SystemExit, match="rows of other settings"):
        made(folder, "--kinds", "native", "--modes", "eager", "--batches", "1", "--tokens", "3")
