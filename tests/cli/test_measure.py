"""``fxfuse record``, ``plan``, ``eval`` and ``demo``, as typed by a user, on a checkpoint of a tiny Llama."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fxfuse import Plan, Recording
from fxfuse.cli.demo import AGAIN, FILES, HEALED, ORIGINAL, PLANNED, UNPLANNED, Sizes
from fxfuse.cli.demo import run as run_demo
from fxfuse.data.loading import load
from fxfuse.planning import Effort
from tests.cli.test_main import run
from tests.planning.costs import costs_of

SMALL = ("--length", "8", "--tokens", "24")


def checkpoint(folder: Path, layers: int) -> str:
    """A folder with a Llama, its weights spread out, and a tokenizer of thirty words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.models.tiny import llama

    words = ["[UNK]", *"the a of to is in and that for it an as be if are or by not with on from".split()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    llama(layers).float().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama_with_words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("words"), layers=3)


@pytest.fixture(scope="session")
def another_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("another"), layers=2)


def test_record_plan_and_eval_go_together(
    capsys: pytest.CaptureFixture[str], llama_with_words: str, tmp_path: Path
) -> None:
    recording, plan = tmp_path / "r.safetensors", tmp_path / "plan.json"

    code, out, err = run(capsys, "record", llama_with_words, "-o", str(recording), *SMALL)
    assert (code, recording.with_name("r.safetensors.partial").exists()) == (0, False), err
    assert "model.layers.2.mlp" in out and "24 tokens" in out
    assert Recording.load(recording).tokens == 24

    code, out, err = run(capsys, "plan", str(recording), "-o", str(plan), "--drop", "1")
    assert (code, len(Plan.load(plan).drop)) == (0, 1), err
    assert "kept drop" in out

    arguments = ("--model", llama_with_words, "--max-kl", "1e9", *SMALL)
    code, out, err = run(capsys, "plan", str(recording), "-o", str(plan), "--json", *arguments)
    made = Plan.load(plan)
    assert (code, Plan.from_json(out)) == (0, made), err
    assert len(made.drop) == 3 and made.parallel

    code, out, err = run(capsys, "eval", llama_with_words, "--plan", str(plan), "--json", *SMALL)
    assert code == 0, err
    metrics = json.loads(out)
    assert metrics["tokens"] == 21 and metrics["kl"] > 0 and 0 <= metrics["agreement"] <= 1
    _, out, _ = run(capsys, "eval", llama_with_words, *SMALL)
    assert "perplexity" in out and "KL" not in out


def test_plan_searches_for_a_target(capsys: pytest.CaptureFixture[str], llama_with_words: str, tmp_path: Path) -> None:
    recording, plan = tmp_path / "r.safetensors", tmp_path / "plan.json"
    run(capsys, "record", llama_with_words, "-o", str(recording), *SMALL)
    arguments = ("plan", str(recording), "-o", str(plan), "--model", llama_with_words, "--device", "h100", *SMALL)

    code, out, err = run(capsys, *arguments, "--target-latency", "0.8")
    assert (code, plan.with_name("plan.json.search").exists()) == (0, False), err
    assert Plan.load(plan).why and "modelled" in out

    code, out, err = run(capsys, *arguments, "--target-latency", "1e-9")
    assert code == 1 and "target_latency asks for 1e-09" in err
    code, out, err = run(capsys, "plan", str(recording), "--target-latency", "0.8")
    assert code == 1 and "give --model" in err


def test_record_goes_on_where_it_was_interrupted(
    capsys: pytest.CaptureFixture[str], llama_with_words: str, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    partial = resumed.with_name("resumed.safetensors.partial")
    run(capsys, "record", llama_with_words, "-o", str(whole), *SMALL)
    loaded = load(llama_with_words)
    import fxfuse
    from fxfuse.data.text import batches_of, python_documentation

    first = list(batches_of(loaded, python_documentation("record"), 8, 8))
    fxfuse.record(loaded.model, first, resume=partial)  # one of three batches, and then the power went

    code, _, err = run(capsys, "record", llama_with_words, "-o", str(resumed), *SMALL)

    assert code == 0, err
    assert resumed.read_bytes() == whole.read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tokens", "8"), "more than max_tokens=8"),
        (("--text", "{text}"), "is not the one"),
        (("--length", "6"), "is not the one"),
        (("--batch", "2"), "is not the one"),
    ],
)
def test_record_does_not_take_the_state_of_another_run_for_its_own(
    more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], llama_with_words: str, tmp_path: Path
) -> None:
    import fxfuse
    from fxfuse.data.text import batches_of, python_documentation

    loaded, output, text = load(llama_with_words), tmp_path / "r.safetensors", tmp_path / "text"
    text.write_text("the a of to is in and that " * 9)
    partial = output.with_name("r.safetensors.partial")
    fxfuse.record(loaded.model, batches_of(loaded, python_documentation("record"), 8, 24), resume=partial)
    content = partial.read_bytes()

    given = (str(text) if argument == "{text}" else argument for argument in more)
    code, _, err = run(capsys, "record", llama_with_words, "-o", str(output), *SMALL, *given)

    assert (code, output.exists(), partial.read_bytes() == content) == (1, False, True)
    assert err.splitlines()[-1].startswith("fxfuse: ")
    assert message in err.splitlines()[-1]


def test_what_the_system_refuses_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)

    code, _, err = run(capsys, "plan", str(recorded), "-o", str(tmp_path / "plan.json"))

    assert (code, err) == (1, "fxfuse: [Errno 28] No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("record", "{model}", "-o", "nowhere/r.safetensors"), "no folder"),
        (("record", "{model}", "-o", "."), "is a folder"),
        (("record", "{model}", "-o", "/proc/x.st"), "cannot write x.st"),
        (("record", "{model}", "--text", "{text}", "-o", "{text}"), "is read by this very command"),
        (("record", "tests.cli.test_main:tiny"), "without a tokenizer"),
        (("eval", "tests.cli.test_main:tiny"), "without a tokenizer"),
        (("plan", "{recording}", "--model", "tests.cli.test_main:tiny"), "without a tokenizer"),
        (("plan", "{recording}", "-o", "."), "is a folder"),
        (("plan", "{recording}", "-o", "{recording}"), "is read by this very command"),
        (("demo", "{model}", "-o", "{text}"), "cannot be made a folder"),
        (("record", "{model}", "--text", "nowhere.txt"), "cannot read the text"),
        (("plan", "nowhere.safetensors"), "there is no recording"),
        (("plan", "{recording}", "--max-kl", "0.1"), "max_kl is measured"),
        (("plan", "{recording}", "--heal"), "--heal is part of a search"),
        (("plan", "{recording}", "--score", "kll"), "there is no score 'kll'"),
        (("plan", "{recording}", "--model", "{other}", *SMALL), "recording of another model"),
        (("plan", "{recording}", "--model", "{other}", "--target-latency", "0.9", "--text", "no.txt"), "another model"),
        (("eval", "{model}", "--plan", "nowhere.json"), "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    llama_with_words: str,
    another_llama: str,
    recorded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text"
    text.write_text("the a of to")
    words = {"{text}": str(text), "{model}": llama_with_words, "{recording}": str(recorded), "{other}": another_llama}

    code, out, err = run(capsys, *(words.get(argument, argument) for argument in arguments))

    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("fxfuse: ")
    assert message in err.splitlines()[-1]


@pytest.fixture(scope="module")
def recorded(llama_with_words: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import fxfuse
    from fxfuse.data.text import batches_of

    loaded = load(llama_with_words)
    path = tmp_path_factory.mktemp("recorded") / "r.safetensors"
    fxfuse.record(loaded.model, batches_of(loaded, "the a of to " * 9, 8, 8)).save(path)
    return path


def demo_sizes() -> Sizes:
    effort = Effort(pool=1, healed=1, patience=0, max_group=2, heal_tokens=64)
    return Sizes(
        length=8, record=64, search=64, heal=256, own=64, judge=64, prompt=6, context=9, repeats=2, effort=effort
    )


@pytest.mark.slow
def test_the_demo_shows_and_writes_everything(llama_with_words: str, recorded: Path, tmp_path: Path) -> None:
    shown, costs = io.StringIO(), costs_of(Recording.load(recorded))
    costs.save(tmp_path / "costs.json")  # the times of so small a model are noise

    result = run_demo(load(llama_with_words), tmp_path, 0.7, demo_sizes(), Console(file=shown, width=250), "eager")

    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "healed"}
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == result.search.plan == Plan.load(tmp_path / "healed" / "plan.json")
    assert costs.of(plan).seconds <= 0.7 * costs.whole
    assert list(result.metrics) == [ORIGINAL, PLANNED, HEALED]
    assert all(list(kinds) == ["near", "far"] for kinds in result.metrics.values())
    assert [(each.phase, each.tokens) for each in result.latencies] == [("prefill", 6), ("decode", 9)]
    assert all(set(each.samples.seconds) == {ORIGINAL, AGAIN, UNPLANNED, HEALED} for each in result.latencies)
    gone = sum("self_attn" in name for name in (*plan.drop, *plan.linear))
    assert result.cache_bytes[HEALED] == result.cache_bytes[ORIGINAL] * (3 - gone) / 3
    assert load(str(tmp_path / "healed")).plan == plan
    assert json.loads(result.to_json())["search"]["plan"]["drop"] == list(plan.drop)
    for words in ("gated_ffn", "perplexity, far", "KV cache", "planned and healed", "takes"):
        assert words in shown.getvalue()
