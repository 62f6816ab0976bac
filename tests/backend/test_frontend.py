from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import fxfuse
from fxfuse.backend.frontend import capture
from fxfuse.model.force import uncompiled
from tests.models.tiny import llama, tokens


@pytest.mark.parametrize(
    "look",
    [lambda model, batch: capture(model, **batch), lambda model, batch: fxfuse.record(model, [batch])],
    ids=["capture", "record"],
)
def test_a_model_that_was_looked_at_is_freed_like_any_other(look: Callable[[Any, dict[str, Any]], object]) -> None:
    model = llama(1)
    gone = [weakref.ref(model), weakref.ref(model.lm_head.weight)]
    look(model, {"input_ids": tokens(1, 5), "use_cache": False})
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_an_uncompiled_model_is_afterwards_what_it_was() -> None:
    model = llama(1)
    before = dict(vars(model))
    with uncompiled(model):
        assert model._compiled_call_impl is None
    assert vars(model) == before

    model.compile(backend="eager")
    before = dict(vars(model))
    with uncompiled(model):
        assert model._compiled_call_impl is None
    assert vars(model) == before
