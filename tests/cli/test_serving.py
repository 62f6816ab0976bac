from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import fxfuse
from fxfuse.cli.serving import original_for
from fxfuse.errors import LoadError
from tests.cli.test_main import run
from tests.exporting.families import tiny
from tests.models.engines import install_fake_vllm

PLAN = fxfuse.Plan(parallel=[["model.layers.1.mlp", "model.layers.2.mlp"]])


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install_fake_vllm(tmp_path, monkeypatch)
    tiny("llama").save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def export(folder: Path, form: str) -> str:
    return str(fxfuse.export(tiny("llama"), PLAN, folder / form, form, check=False))


ASKED = ("--engine", "vllm", "--length", "8", "--tokens", "2", "--repeats", "3")


def test_json_has_the_original_twice_and_the_export(
    capsys: pytest.CaptureFixture[str], original: Path, tmp_path: Path
) -> None:
    args = ["--export", export(tmp_path, "nemotron-nas"), "--python", sys.executable, "--batch", "2", "--json"]
    code, out, err = run(capsys, "bench", str(original), *ASKED, *args)

    told = json.loads(out)
    assert [phase["phase"] for phase in told["phases"]] == ["first token", "next token"]
    for phase in told["phases"]:
        assert list(phase["programs"]) == ["original", "original again", "export"]
        assert all(len(program["seconds"]) == 3 for program in phase["programs"].values())
    assert told["requests"] == {"batch": 2, "length": 8, "tokens": 2, "stretches": 1}
    assert set(told["engines"].values()) == {"vLLM 1, auto eager, auto"}
    void = any(phase["void"] for phase in told["phases"])
    assert (code, "void" in err) == (int(void), void)


def test_the_code_of_transformers_computes_the_original_too_if_it_does_the_export(
    capsys: pytest.CaptureFixture[str], original: Path, tmp_path: Path
) -> None:
    args = ["--export", export(tmp_path, "transformers"), "--compiled", "--dtype", "float32"]
    _, out, err = run(capsys, "bench", str(original), *ASKED, *args)

    assert "original again: vLLM 1, transformers compiled, float32" in err
    assert "export: vLLM 1, transformers compiled, float32" in err
    assert "threads, load" in out
    assert out.count("original again") == out.count("export") == 2


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (["--engine", "vllm"], 2, "name that with --export"),
        (["--export", "x"], 2, "--export goes with --engine"),
        (["--engine", "vllm", "--export", "x", "--prepack"], 2, "of torch.compile"),
        (["--engine", "vllm", "--export", "x", "--inner", "eager"], 2, "of torch.compile"),
        (["--engine", "tgi", "--export", "x"], 1, "unknown engine 'tgi'"),
        (["--engine", "llama.cpp", "--export", "x", "--compiled"], 1, "vLLM's: llama.cpp knows none"),
        (["--engine", "llama.cpp", "--export", "x"], 1, "there is no 'x'"),
        (["--engine", "llama.cpp", "--export", "original"], 1, "no GGUF file"),
        (["--engine", "vllm", "--export", "x"], 1, "there is no 'x'"),
        (["--engine", "vllm", "--export", "packages"], 1, "'packages' is no folder of a model"),
        (["--engine", "vllm", "--export", "original", "--python", "/no/python"], 1, "no Python that can be run"),
    ],
)
def test_what_is_wrong_is_one_line(
    args: list[str], code: int, reason: str, capsys: pytest.CaptureFixture[str], original: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(original.parent)

    got, out, err = run(capsys, "bench", str(original), *args)

    assert (got, out) == (code, "")
    assert reason in " ".join(err.replace("│", " ").split())


def test_a_name_that_is_no_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="'smollm3' is no folder"):
        original_for("vllm", "smollm3", tmp_path)


@pytest.mark.slow
def test_smollm2_is_written_for_vllm_and_is_a_gguf_file_for_llama_cpp(tmp_path: Path) -> None:
    assert (original_for("vllm", "smollm2", tmp_path) / "config.json").is_file()
    assert original_for("llama.cpp", "smollm2", tmp_path).suffix == ".gguf"
