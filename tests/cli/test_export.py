from __future__ import annotations

from pathlib import Path

import pytest
import torch
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
