"""lm_eval on tiny models: what it scores is what the planned model computes, told by hand."""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import fxfuse
from fxfuse.errors import MissingDependencyError, OptionError, RecordError
from fxfuse.measure.tasks import harness
from fxfuse.measure.tasks.harness import score
from fxfuse.measure.tasks.shipped import _KINDS, SHIPPED, Shipped
from tests.models.tiny import llama, planned

PLAN = fxfuse.Plan(drop=["model.layers.1.self_attn"], parallel=[["model.layers.0.mlp", "model.layers.1.mlp"]])


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the characters of ASCII."""
    ascii_ = [symbol for letter, symbol in zip(*_bytes(), strict=True) if letter in (10, *range(32, 127))]
    made = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(["<end>", *ascii_])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def _bytes() -> tuple[list[int], list[str]]:
    """All bytes below 128, and the signs that stand for them in a vocabulary."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return list(range(128)), [split.pre_tokenize_str(chr(byte))[0][0] for byte in range(128)]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a task reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def original() -> Any:
    return llama(4, vocab_size=97)


@pytest.fixture(scope="module")
def applied(original: Any) -> Any:
    return fxfuse.apply(copy.deepcopy(original), PLAN, inner="eager")


@pytest.fixture(scope="module")
def reference(original: Any) -> Any:
    return planned(original, PLAN.drop, PLAN.parallel)


def best_choices(model: Any, tokenizer: Any, documents: list[Any]) -> list[int]:
    """The likeliest choice of each document, from whole sequences of logits, without cache or batches."""
    made = []
    for document in documents:
        prompt, sums = tokenizer.encode(document["prompt"]), []
        for choice in document["choices"]:
            answer = tokenizer.encode(choice)
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            sums.append(float(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()))
        made.append(sums.index(max(sums)))
    return made


def written(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    """What a model writes, always the likeliest token, without cache."""
    tokens = tokenizer.encode(prompt)
    for _ in range(length):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return str(tokenizer.decode(tokens[len(tokens) - length :]))


@torch.no_grad()
def test_choices_are_those_of_the_planned_model(
    original: Any, applied: Any, reference: Any, letters: PreTrainedTokenizerFast
) -> None:
    documents = SHIPPED["cloze"].make(Random("cloze"))[:40]
    right = [document["answer"] for document in documents]
    by_hand = best_choices(reference, letters, documents)
    assert by_hand != best_choices(original, letters, documents)

    (found,) = score(applied, letters, ["cloze"], limit=40)

    assert list(found.each) == [float(one == other) for one, other in zip(by_hand, right, strict=True)]
    assert (found.task, found.metric, found.documents, found.chance) == ("cloze", "acc", 40, 0.25)
    assert found.score == pytest.approx(sum(found.each) / 40)
    assert found.error == pytest.approx(float(np.std(found.each, ddof=1)) / 40**0.5)


@pytest.mark.parametrize(("kind", "metric"), [("likeliest", "acc"), ("written", "exact_match")])
@torch.no_grad()
def test_what_is_right_is_what_the_planned_model_would_write(
    kind: str,
    metric: str,
    original: Any,
    applied: Any,
    reference: Any,
    letters: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    length = _KINDS["written"]["generation_kwargs"]["max_gen_toks"]  # type: ignore[index]
    prompts = [f"{number} and" for number in range(4)]
    answers = [written(reference, letters, prompt, length) for prompt in prompts]
    assert all(written(original, letters, p, length) != a for p, a in zip(prompts, answers, strict=True))
    if kind == "written":
        answers = [answer.partition("\n")[0].strip() for answer in answers]
    answers[-1] = f"{answers[-1]}x"
    documents = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    monkeypatch.setitem(SHIPPED, "own", Shipped(lambda random: documents, kind))  # type: ignore[arg-type]

    (found,) = score(applied, letters, ["own"])
    (unplanned,) = score(original, letters, ["own"])

    assert (found.metric, found.each, found.chance) == (metric, (1.0, 1.0, 1.0, 0.0), 0.0)
    assert unplanned.each == (0.0, 0.0, 0.0, 0.0)


def test_a_model_and_the_random_numbers_are_left_as_they_were(original: Any, letters: PreTrainedTokenizerFast) -> None:
    model = copy.deepcopy(original)
    model.model.layers[1].train()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()

    score(model, letters, ["cloze", "rewriting"], limit=2)

    assert [module.training for module in model.modules()] == flags
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_all_is_every_task_once_in_order(original: Any, letters: PreTrainedTokenizerFast) -> None:
    scores = score(original, letters, ["rewriting", "all"], limit=1)

    assert [each.task for each in scores] == ["rewriting", *(name for name in SHIPPED if name != "rewriting")]
    assert all(np.isnan(each.error) for each in scores)


def test_evaluate_scores_the_model_and_its_reference(
    original: Any, applied: Any, letters: PreTrainedTokenizerFast
) -> None:
    batches = [{"input_ids": torch.arange(1, 9)[None]}]

    found = fxfuse.evaluate(applied, batches, original, tasks=["cloze"], tokenizer=letters, task_limit=5)

    assert found.tasks == score(applied, letters, ["cloze"], limit=5)
    assert found.reference_tasks == score(original, letters, ["cloze"], limit=5)
    assert "model - reference" in str(found) and "cloze" in str(found)
    assert json.loads(found.to_json())["tasks"][0]["each"] == list(found.tasks[0].each)
    alone = fxfuse.evaluate(applied, batches, tasks=["cloze"], tokenizer=letters, task_limit=5)
    assert alone.tasks == found.tasks and alone.reference_tasks == ()


class TestBadInput:
    def refused(self, error: type[Exception], words: str, model: Any, tokenizer: Any, **given: Any) -> None:
        def batches() -> Iterator[dict[str, object]]:
            raise AssertionError("evaluated before the arguments were checked")
            yield {}

        arguments = {"tasks": ["cloze"]} | given
        limit = {"task_limit": arguments.pop("limit")} if "limit" in arguments else {}
        with pytest.raises(error, match=words):
            fxfuse.evaluate(model, batches(), tokenizer=tokenizer, **arguments, **limit)

    def test_what_torch_compile_returns(self, original: Any, letters: Any) -> None:
        self.refused(OptionError, r"without its plan.*fxfuse.apply\(model, plan\)", torch.compile(original), letters)

    def test_a_model_that_cannot_write(self, letters: Any) -> None:
        self.refused(OptionError, "Hugging Face.*not a Linear", nn.Linear(2, 2), letters)

    def test_no_tokenizer(self, original: Any) -> None:
        self.refused(OptionError, "give tokenizer=", original, None)

    def test_a_tokenizer_without_an_end(self, original: Any, letters: PreTrainedTokenizerFast) -> None:
        endless = copy.deepcopy(letters)
        endless.eos_token = None
        self.refused(OptionError, "set its eos_token", original, endless)

    def test_no_such_task(self, original: Any, letters: Any) -> None:
        self.refused(OptionError, "no task 'clozes'; nearest: cloze", original, letters, tasks=["clozes"])
        self.refused(OptionError, "tasks is a list.*not 'cloze'", original, letters, tasks="cloze")

    def test_a_limit_below_one(self, original: Any, letters: Any) -> None:
        self.refused(OptionError, "limit must be at least 1", original, letters, limit=0)

    def test_no_lm_eval(self, original: Any, letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(harness, "find_spec", lambda name: None)
        self.refused(MissingDependencyError, r"pip install 'fxfuse\[eval\]'", original, letters)

    def test_a_model_that_fails(self, original: Any, letters: Any) -> None:
        model = copy.deepcopy(original)
        model.model.layers[0].mlp = nn.Linear(3, 3)
        with pytest.raises(RecordError, match="lm_eval could not run the tasks: RuntimeError"):
            score(model, letters, ["cloze"], limit=1)


def test_a_task_of_lm_evals_can_be_given_as_a_file(
    original: Any, letters: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.jsonl").write_text('{"q": "one and", "a": " two"}\n' * 3)
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        'test_split: test\noutput_type: loglikelihood\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        "metric_list: [{metric: acc}]\n"
    )

    (found,) = score(original, letters, [str(tmp_path / "mine.yaml")])

    assert (found.task, found.metric, found.documents, found.chance) == ("mine", "acc", 3, None)
