"""One plan for all graphs of a model, from the moment on when the block ends."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse._torch.compiled import arguments_of
from fxfuse.errors import OptionError, RecordError
from fxfuse.planning.calibration import _Seat
from tests.models.tiny import Tower, llama, planned, tokens, vectors

Compile = Callable[..., Any]


def as_wrapper(model: nn.Module, **given: Any) -> Any:
    return torch.compile(model, backend="ffnfuse", options={"inner": "eager"}, **given)


def in_place(model: nn.Module, **given: Any) -> Any:
    model.compile(backend="ffnfuse", options={"inner": "eager"}, **given)
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


class Moody(Tower):
    """Breaks its graph, computes NaN, or raises, as it is asked to."""

    def forward(self, x: Tensor, mood: str = "") -> Tensor:
        if mood == "raise":
            raise ValueError("not today")
        for index, layer in enumerate(self.layers):
            if mood == "break" and index == 1:
                torch._dynamo.graph_break()
            x = layer(x)
        return x * torch.nan if mood == "nan" else x


@either_way
def test_a_model_that_is_being_calibrated_is_refused_and_can_be_again_afterwards(compiled_as: Compile) -> None:
    compiled = compiled_as(Tower(2))

    with pytest.raises(OptionError, match="being calibrated already"), fxfuse.calibrate(compiled):  # noqa: SIM117
        with fxfuse.calibrate(compiled):
            pass

    with pytest.raises(RecordError, match="nothing was recorded"), fxfuse.calibrate(compiled):
        pass


@either_way
@pytest.mark.parametrize(
    "given", [{"fullgraph": True}, {"dynamic": False, "recompile_limit": 5, "isolate_recompiles": True}]
)
def test_the_model_is_compiled_as_it_was_but_for_the_plan(compiled_as: Compile, given: dict[str, Any]) -> None:
    known = signature(torch.compile).parameters  # torch 2.11.0 lacks the last two
    given = {name: value for name, value in given.items() if name in known}
    compiled, plan = compiled_as(Tower(2), **given), fxfuse.Plan(drop=["layers.0.mlp"])
    before = arguments_of(compiled)
    assert before.items() >= given.items()

    _Seat(compiled).follow(plan)

    assert arguments_of(compiled) == {**before, "options": {"inner": "eager", "plan": plan}}


def test_a_model_of_one_graph_stays_one() -> None:
    compiled = as_wrapper(Moody(2), fullgraph=True)
    _Seat(compiled).follow(fxfuse.Plan(drop=["layers.0.mlp"]))

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(vectors(), mood="break")


@either_way
def test_what_the_model_raises_comes_out_as_it_is_and_does_no_harm(compiled_as: Compile) -> None:
    compiled, x = compiled_as(Moody(2)), vectors()

    def use() -> None:
        with pytest.raises(ValueError, match="not today"):
            compiled(x, mood="raise")
        compiled(x)
        compiled(x)

    with pytest.raises(RecordError, match="none of the calls"), fxfuse.calibrate(compiled) as calibration:
        use()

    assert calibration.recording is not None
    assert calibration.recording.tokens == 2 * x[..., 0].numel()
    assert calibration.unrecorded == 0


@either_way
def test_a_call_that_cannot_be_recorded_returns_what_it_does_and_is_told_of_at_the_end(compiled_as: Compile) -> None:
    compiled, x = compiled_as(Moody(2)), vectors()
    expected = Moody(2)(x)

    with pytest.raises(RecordError, match="2 graphs.*graph breaks"), fxfuse.calibrate(compiled) as calibration:
        torch.testing.assert_close(compiled(x, mood="break"), expected)
    assert calibration.unrecorded == 1

    def use() -> None:
        compiled(x)
        assert compiled(x, mood="nan").isnan().all()
        torch.testing.assert_close(compiled(x), expected)

    with pytest.raises(RecordError, match="logits with nothing dropped"), fxfuse.calibrate(compiled) as calibration:
        use()
    assert calibration.unrecorded == 1
