from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fxfuse.bench.prefill_decode import cache_bytes_per_token, decode, filled_cache
from fxfuse.data.batches import cache_keyword, cache_of
from tests.models.tiny import llama, tokens


class Old(nn.Module):
    """A model as of before the cache was renamed."""

    def forward(self, input_ids: object, past_key_values: object = None) -> None: ...


class New(nn.Module):
    def forward(self, input_ids: object, cache: object = None) -> None: ...


@pytest.mark.parametrize(("model", "name"), [(Old(), "past_key_values"), (New(), "cache")])
def test_a_cache_goes_by_the_name_that_the_model_gives_it_compiled_or_not(model: nn.Module, name: str) -> None:
    compiled: Any = torch.compile(model, backend="eager")

    assert cache_keyword(model) == cache_keyword(compiled) == cache_keyword(model.forward) == name


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_in_the_output_under_either_name(name: str) -> None:
    cache = object()

    assert cache_of(SimpleNamespace(**{name: cache})) is cache
    assert cache_of(SimpleNamespace(logits=cache)) is None


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers logs, and says once only; its warnings are errors."""
    from transformers.utils import logging as theirs

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.Logger, "warning_once", logging.Logger.warning)
    theirs.set_verbosity_warning()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield caplog


def test_a_decode_step_of_a_llama_is_timed_without_a_word_of_deprecation(said: pytest.LogCaptureFixture) -> None:
    model, ids = llama(2), tokens(1, 5)
    cache: Any = filled_cache(model, ids)

    decode({"original": model}, {"original": cache}, ids, repeats=1)

    assert cache.get_seq_length() == 5
    assert cache_bytes_per_token(model, ids) == 2 * 2 * 16 * 8  # two layers, keys and values of two heads of 8
    assert "deprecated" not in said.text
