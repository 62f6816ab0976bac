from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fxfuse.data.loading import Loaded
from fxfuse.data.text import batches_of, docstrings, licences, python_documentation, read_text
from fxfuse.errors import LoadError


class Words:
    """A tokenizer: a word, a number."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def decode(self, token_ids: list[int]) -> str:
        return " ".join("x" * length for length in token_ids)


def language_model(tokenizer: Words | None = Words()) -> Loaded:  # noqa: B008 - it holds nothing
    return Loaded(nn.Identity(), tokenizer, (), {"input_ids": torch.tensor([[1, 2]]), "use_cache": False})


def test_each_sequence_is_whole_and_comes_once() -> None:
    text = " ".join("x" * n for n in range(1, 12))

    batches = list(batches_of(language_model(), text, length=3, tokens=100, batch=2))

    assert [batch["input_ids"].tolist() for batch in batches] == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9]]]  # type: ignore[attr-defined]
    assert all(batch["use_cache"] is False for batch in batches)


def test_no_more_than_the_tokens_asked_for_rounded_up_to_a_sequence() -> None:
    batches = list(batches_of(language_model(), "a " * 100, length=4, tokens=9))

    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(1, 4)] * 3  # type: ignore[attr-defined]


def test_what_cannot_be_cut_into_sequences_is_an_error() -> None:
    with pytest.raises(LoadError, match="3 tokens, less than one sequence of 4"):
        next(batches_of(language_model(), "a b c", length=4, tokens=9))
    with pytest.raises(LoadError, match="without a tokenizer"):
        next(batches_of(language_model(None), "a b c", length=2, tokens=9))
    with pytest.raises(LoadError, match="at least 2"):
        next(batches_of(language_model(), "a b c", length=1, tokens=9))


def test_the_parts_of_the_documentation_share_nothing() -> None:
    parts = [set(python_documentation(use).split("\n\n")) for use in ("record", "plan", "hold out")]

    long = [{paragraph for paragraph in part if len(paragraph) > 200} for part in parts]
    assert all(len(part) > 30 for part in long)
    assert not long[0] & long[1] and not long[0] & long[2] and not long[1] & long[2]


def test_a_text_that_is_not_there_or_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot read"):
        read_text(tmp_path / "nowhere")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoadError, match="cannot read"):
        read_text(tmp_path / "bytes")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(LoadError, match="empty"):
        read_text(tmp_path / "empty")


@pytest.mark.parametrize("text", [docstrings, licences])
def test_texts_that_are_always_at_hand_say_nothing_twice_and_are_long(text: Callable[[], str]) -> None:
    paragraphs = [" ".join(part.split()) for part in text().split("\n\n") if len(part.split()) > 60]
    assert len(text()) > 30_000 and text() == text()
    assert len(set(paragraphs)) > 0.95 * len(paragraphs)
