from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fxfuse import Plan
from fxfuse.cli.main import main
from tests.models.tiny import llama, planned, tokens

DROP, PARALLEL = ["model.layers.1.self_attn"], [["model.layers.0.mlp", "model.layers.1.mlp"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama with a tokenizer of fifty words and a chat template, and a plan."""
    llama(3, dtype=torch.float64).save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(50)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "model")
    Plan(drop=DROP, parallel=PARALLEL).save(tmp_path / "plan.json")
    return tmp_path


def run(folder: Path, *more: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(folder / "model"), "-o", str(folder / "out"), *more])
    return ended.value.code


@pytest.mark.parametrize("form", ["transformers", "nemotron-nas"])
def test_a_model_and_its_plan_become_a_folder(form: str, folder: Path) -> None:
    assert run(folder, "--plan", str(folder / "plan.json"), "--format", form) == 0

    made = AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True, dtype=torch.float64).eval()
    wanted = planned(llama(3, dtype=torch.float64), DROP, PARALLEL)
    with torch.no_grad():
        difference = made(input_ids=tokens()).logits - wanted(input_ids=tokens()).logits
    assert difference.abs().max() < 1e-8
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    assert tokenizer.encode("w3 w4") == [3, 4]
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert Plan.load(folder / "out" / "plan.json") == Plan(drop=DROP, parallel=PARALLEL)


def test_without_a_plan_there_is_nothing_to_export(folder: Path) -> None:
    assert "give one with --plan" in str(run(folder))
    assert not (folder / "out").exists()


def test_a_folder_that_is_there_is_replaced_only_if_asked_to(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine").touch()

    assert "not empty" in str(run(folder, "--plan", str(folder / "plan.json")))
    assert (folder / "out" / "mine").exists()
    assert run(folder, "--plan", str(folder / "plan.json"), "--overwrite", "--no-check") == 0
    assert not (folder / "out" / "mine").exists()


def test_gguf_takes_the_type_of_matrices(tmp_path: Path) -> None:
    llama(3, dtype=torch.float32).save_pretrained(tmp_path / "model")
    split = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    split.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=split).save_pretrained(tmp_path / "model")
    Plan(drop=DROP, parallel=PARALLEL).save(tmp_path / "plan.json")

    assert run(tmp_path, "--plan", str(tmp_path / "plan.json"), "--format", "gguf", "--type", "q8_0") == 0

    kinds = {each.name: each.tensor_type.name for each in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_norm.weight"] == "F32"
