"""One plan for all graphs of a model, from the moment on when the block ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import OptionError, RecordError
from tests.tiny import llama, planned, tokens

Compile = Callable[[nn.Module], Any]


def as_wrapper(model: nn.Module) -> Any:
    return torch.compile(model, backend="ffnfuse", options={"inner": "eager"})


def in_place(model: nn.Module) -> Any:
    model.compile(backend="ffnfuse", options={"inner": "eager"})
    return model


either_way = pytest.mark.parametrize("compiled_as", [as_wrapper, in_place])


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


@either_way
@torch.no_grad()
def test_all_graphs_follow_the_plan_when_the_block_ends(compiled_as: Compile) -> None:
    model = llama(2)
    original = planned(model)
    compiled = compiled_as(model)
    shapes = [tokens(2, 9, 1), tokens(1, 12, 2)]
    before = [logits(compiled, ids) for ids in shapes]  # graphs that know of no plan

    with fxfuse.calibrate(compiled, max_kl=10.0) as calibration:
        during = [logits(compiled, ids) for ids in shapes]

    assert calibration.plan
    assert calibration.recording is not None
    assert calibration.recording.tokens == 18 + 12
    reference = planned(model, calibration.plan.drop, calibration.plan.parallel)
    for ids, one, other in zip(shapes, before, during, strict=True):
        torch.testing.assert_close(one, logits(original, ids))
        torch.testing.assert_close(other, one)
        after = logits(compiled, ids)
        torch.testing.assert_close(after, logits(reference, ids))
        assert not torch.allclose(after, one)


@torch.no_grad()
def test_generate_calibrates_on_its_prompts() -> None:
    model = llama(2)
    plain = planned(model)
    model.compile(backend="ffnfuse", options={"inner": "eager"})
    ids = tokens(1, 8)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}

    with fxfuse.calibrate(model, max_kl=10.0) as calibration:
        made = model.generate(ids, **settings)

    assert torch.equal(made, plain.generate(ids, **settings))
    assert calibration.recording is not None
    assert calibration.recording.tokens == 8 + 2  # the prompt, and the steps but for the last token
    assert len(calibration.batches) >= 1
    assert calibration.plan
    reference = planned(model, calibration.plan.drop, calibration.plan.parallel)
    torch.testing.assert_close(logits(model, ids), logits(reference, ids))


@either_way
def test_if_the_block_raises_nothing_changes(compiled_as: Compile) -> None:
    model = llama(2)
    compiled = compiled_as(model)
    expected = logits(planned(model), tokens())

    def interrupted() -> None:
        with fxfuse.calibrate(compiled, max_kl=10.0):
            logits(compiled, tokens())
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()

    torch.testing.assert_close(logits(compiled, tokens()), expected)
    with fxfuse.calibrate(compiled, max_kl=10.0) as calibration:  # nor is the way barred to try again
        logits(compiled, tokens())
    assert calibration.plan


def test_calls_beyond_the_tokens_asked_for_are_not_recorded() -> None:
    compiled = as_wrapper(llama(2))

    with fxfuse.calibrate(compiled, max_kl=10.0, max_tokens=10) as calibration:
        for seed in range(4):
            logits(compiled, tokens(1, 7, seed))

    assert calibration.recording is not None
    assert calibration.recording.tokens == 14


def test_a_block_without_a_call_is_an_error_and_changes_nothing() -> None:
    model = llama(2)
    compiled = as_wrapper(model)

    with pytest.raises(RecordError, match="nothing was recorded"), fxfuse.calibrate(compiled):
        pass

    torch.testing.assert_close(logits(compiled, tokens()), logits(planned(model), tokens()))


def test_only_a_model_compiled_with_the_backend_and_without_a_plan_is_taken() -> None:
    plan = fxfuse.Plan(parallel=[["model.layers.0.mlp", "model.layers.1.mlp"]])
    with_plan: Any = {"plan": plan, "inner": "eager"}

    for other in (llama(2), torch.compile(llama(2), backend="eager")):
        with pytest.raises(OptionError, match="compiled with torch.compile"), fxfuse.calibrate(other):
            pass
    with (
        pytest.raises(OptionError, match="follows a plan already"),
        fxfuse.calibrate(torch.compile(llama(2), backend="ffnfuse", options=with_plan)),
    ):
        pass
