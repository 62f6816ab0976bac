from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fxfuse import Plan
from fxfuse.cli.main import main
from fxfuse.data.loading import load
from fxfuse.errors import HealError
from fxfuse.model.healed import healed_for
from tests.models.tiny import llama

WORDS = [f"w{n}" for n in range(50)]
PLAN = Plan(drop=["model.layers.1.self_attn"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama with a tokenizer of fifty words, a text and a plan."""
    model = llama(3, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.3
    model.save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    (tmp_path / "text.txt").write_text(" ".join(WORDS[n] for n in torch.randint(50, (2000,)).tolist()))
    PLAN.save(tmp_path / "plan.json")
    return tmp_path


def run(folder: Path, *more: str) -> int:
    arguments = [str(folder / "model"), "--plan", str(folder / "plan.json"), "--text", str(folder / "text.txt")]
    with pytest.raises(SystemExit) as ended:
        main(["heal", *arguments, "--length", "32", "--tokens", "1600", "--own", "0", *more])
    return ended.value.code if isinstance(ended.value.code, int) else 1


def test_the_folder_holds_the_healed_model_and_its_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "-o", str(folder / "healed"), "--json") == 0

    said = json.loads(capsys.readouterr().out)
    (kl,) = said["kl"].values()
    assert kl["after"] < kl["before"] and said["share"] > 0
    assert Plan.load(folder / "healed" / "plan.json") == PLAN
    assert load(str(folder / "healed")).plan == PLAN
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "healed")
    assert healed_for(model) == PLAN
    assert not (folder / "healed.partial").exists()


def test_a_folder_that_is_not_empty_is_not_written_to(folder: Path) -> None:
    before = sorted((folder / "model").iterdir())
    assert run(folder, "-o", str(folder / "model")) == 1
    assert sorted((folder / "model").iterdir()) == before


def test_a_healed_model_is_not_healed_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "-o", str(folder / "healed")) == 0
    (folder / "model").rename(folder / "original")
    (folder / "healed").rename(folder / "model")
    with pytest.raises(SystemExit) as ended:
        main(["heal", str(folder / "model"), "--plan", str(folder / "plan.json"), "-o", str(folder / "again")])
    assert "give the original model" in str(ended.value.code)
    assert not (folder / "again").exists()


@pytest.mark.parametrize(
    ("given", "wanted"), [("30", 30.0), ("fit=5,distill=20", {"fit": 5.0, "distill": 20.0}), ("fit=5", {"fit": 5.0})]
)
def test_methods_times_and_weights_are_handed_on(
    folder: Path, given: str, wanted: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def heal(model: Any, plan: Plan, kinds: Any, method: Any, **options: Any) -> Any:
        seen.update(options, method=method, kinds=list(kinds))
        raise HealError("enough was seen")

    monkeypatch.setattr("fxfuse.heal", heal)
    assert (
        run(folder, "-o", str(folder / "healed"), "--method", "fit,distill", "--minutes", given, "--weight", "2") == 1
    )

    assert seen["method"] == ["fit", "distill"] and seen["minutes"] == wanted
    assert seen["weights"] == {seen["kinds"][0]: 2.0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--minutes", "soon"], "--minutes soon"),
        (["--minutes", "fit=5,distill"], "give a number"),
        (["--minutes", "local=5"], "minutes has 'local'"),
        (["--weight", "2", "--weight", "1"], "there are 2 weights and 1 texts"),
        (["--weight", "0"], "positive"),
    ],
)
def test_what_cannot_be_read_is_said(folder: Path, options: list[str], words: str) -> None:
    arguments = [str(folder / "model"), "--plan", str(folder / "plan.json"), "--text", str(folder / "text.txt")]
    with pytest.raises(SystemExit) as ended:
        main(["heal", *arguments, "-o", str(folder / "healed"), "--own", "0", *options])
    assert words in str(ended.value.code) and not (folder / "healed").exists()
