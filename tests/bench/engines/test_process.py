from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxfuse.bench.engines.process import Settings, serving
from fxfuse.errors import EngineError, MissingDependencyError
from tests.models.engines import install_fake_vllm


def model(folder: Path, **config: object) -> Path:
    made = folder / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"vocab_size": 50, **config}))
    return made


def test_an_engine_says_what_it_is_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_vllm(tmp_path, monkeypatch)
    settings = Settings(implementation="transformers", dtype="float32")

    with serving("vllm", model(tmp_path), tmp_path / "log", settings=settings) as engine:
        made = [engine.generate([[5], [1, 7]], 3), engine.generate([[9]], 1)]
        engine.begin([[9], [1]])
        done = engine.go_on(2)

    assert engine.served.description == "vLLM 1, transformers eager, float32"
    assert (engine.served.vocabulary, engine.served.holds) == (50, 16_000)
    assert made == [[[6, 7, 8], [8, 9, 10]], [[10]]]
    assert done.busy > 0
    assert done.seconds > 0.002
    assert done.tokens == [[10, 11, 12, 13], [2, 3, 4]]  # the first of them went on while the other was read
    assert "hello from the engine" in (tmp_path / "log").read_text()


def test_prompts_that_are_more_than_the_sequences_are_answered_one_batch_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_vllm(tmp_path, monkeypatch)

    with serving("vllm", model(tmp_path), tmp_path / "log", settings=Settings(sequences=2)) as engine:
        assert engine.generate([[5], [1], [8]], 2) == [[6, 7], [2, 3], [9, 10]]
        assert len(engine.go_on(1).tokens) == 1


def test_the_users_environment_goes_before_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_vllm(tmp_path, monkeypatch)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")

    with serving("vllm", model(tmp_path), tmp_path / "log", settings=Settings(compiled=True)) as engine:
        assert engine.served.description == "vLLM 7, auto compiled, auto"


def test_a_python_without_the_engine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_vllm(tmp_path, monkeypatch, "raise ModuleNotFoundError('none here')")

    with (
        pytest.raises(MissingDependencyError, match=r"has no vllm \(none here\).*--python.*pip install vllm there"),
        serving("vllm", model(tmp_path), tmp_path / "log"),
    ):
        raise AssertionError


def test_a_model_that_the_engine_refuses_is_said_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_vllm(tmp_path, monkeypatch)

    with (
        pytest.raises(EngineError, match="vllm does not load .*model': ValueError: odd heads"),
        serving("vllm", model(tmp_path, refuse="odd heads"), tmp_path / "log"),
    ):
        raise AssertionError


def test_an_engine_that_ends_is_said_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_vllm(tmp_path, monkeypatch)

    with serving("vllm", model(tmp_path, end="out of memory"), tmp_path / "log") as engine:
        for _ in range(2):
            with pytest.raises(EngineError, match="has ended, exit code 3; its last words: (.|\n)*out of memory"):
                engine.generate([[1]], 1)


@pytest.mark.parametrize(
    ("engine", "python", "reason"),
    [
        ("vlm", "", "unknown engine 'vlm'; nearest: vllm"),
        ("vllm", "/no/python", "'/no/python' is no Python that can be run"),
        ("llama.cpp", "", "no GGUF file, and no folder that has a model.gguf"),
    ],
)
def test_what_cannot_be_started_is_said(engine: str, python: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=reason), serving(engine, model(tmp_path), tmp_path / "log", python):
        raise AssertionError


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"it has no config\.json"), serving("vllm", tmp_path, tmp_path / "log"):
        raise AssertionError
