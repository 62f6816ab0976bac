from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fxfuse import Plan, PlanError
from fxfuse.data.batches import cache_keyword
from fxfuse.errors import RecordError
from fxfuse.measure.evaluation import evaluate
from fxfuse.measure.planned import Planned, compiled
from fxfuse.packing.calls import _PACKS
from fxfuse.planning import Meter
from fxfuse.planning.meter import Replay
from tests.models.tiny import Counter, llama, planned, tokens

EDITS = {"drop": ["model.layers.1.self_attn"], "parallel": [["model.layers.0.mlp", "model.layers.1.mlp"]]}
PLAN = Plan(**EDITS)
BRANCHES = [f"model.layers.{index}.{part}" for index in range(2) for part in ("self_attn", "mlp")]


def batches(*lengths: int) -> list[dict[str, Any]]:
    return [{"input_ids": tokens(2, length, seed=length), "use_cache": False} for length in lengths or (9,)]


def truth(model: Any, given: list[dict[str, Any]], **edits: Any) -> float:
    """What the plan costs, by the model's own modules."""
    found = evaluate(planned(model, **(edits or EDITS)), given, model).kl
    assert found is not None
    return found


class TestTheCost:
    def test_is_that_of_the_planned_model_for_batches_of_any_shape_run_and_compiled(self) -> None:
        model, given = llama(2), batches(9, 5, 12)
        meter, expected = Meter(model, given), truth(model, given)

        assert expected > 1e-3
        assert meter(PLAN) == pytest.approx(expected, rel=1e-8)
        assert meter.final(PLAN) == pytest.approx(expected, rel=1e-8)

    def test_is_the_same_when_a_batch_holds_a_cache(self) -> None:
        model, given = llama(2), batches(9)
        cache = DynamicCache(config=model.config)
        meter = Meter(model, [{"input_ids": given[0]["input_ids"], cache_keyword(model): cache}])

        assert meter(PLAN) == pytest.approx(truth(model, given), rel=1e-8)
        assert meter.final(PLAN) == pytest.approx(truth(model, given), rel=1e-8)
        assert cache.get_seq_length() == 0

    def test_of_no_plan_is_nothing(self) -> None:
        meter = Meter(llama(1), [])
        assert meter(Plan()) == 0.0
        assert meter.final(Plan()) == 0.0

    def test_is_measured_on_as_many_tokens_as_asked_for(self) -> None:
        model = llama(2)

        def endless() -> Iterator[dict[str, Any]]:
            while True:
                yield from batches(9, 5)

        meter = Meter(model, endless(), max_tokens=24, search_tokens=16)
        assert meter(PLAN) == pytest.approx(truth(model, batches(9)), rel=1e-8)
        assert meter.final(PLAN) == pytest.approx(truth(model, batches(9, 5)), rel=1e-8)

    def test_of_a_plan_is_measured_once(self) -> None:
        model = llama(2)
        meter = Meter(model, batches())
        first = meter(PLAN)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        assert meter(Plan(**EDITS)) == first

    def test_of_one_plan_after_another_is_its_own(self) -> None:
        meter = Meter(llama(2), batches())
        costs = [meter(Plan(drop=[name])) for name in BRANCHES]

        assert costs == pytest.approx([truth(llama(2), batches(), drop=[name]) for name in BRANCHES], rel=1e-8)
        assert len({round(cost, 9) for cost in costs}) == len(BRANCHES)

    @pytest.mark.parametrize("how", ["run", "compiled"])
    def test_of_a_plan_that_does_not_fit_is_an_error(self, how: str) -> None:
        meter = Meter(llama(2), batches())
        with pytest.raises(PlanError, match=r"model\.layers\.7\.mlp"):
            (meter if how == "run" else meter.final)(Plan(drop=["model.layers.7.mlp"]))

    def test_on_bad_batches_is_an_error(self) -> None:
        with pytest.raises(RecordError, match="batch 0"):
            Meter(llama(2), [{"x": 1}])(PLAN)


class TestTheModel:
    @pytest.mark.parametrize("road", ["torch.compile", "in place"])
    def test_compiled_before_by_its_user_is_what_it_was(self, road: str) -> None:
        model, counter = llama(2), Counter()
        other = {"drop": ["model.layers.0.self_attn"]}
        options: Any = {"plan": Plan(**other), "inner": counter}
        if road == "in place":
            model.compile(backend="ffnfuse", options=options)
            made: Any = model
        else:
            made = torch.compile(model, backend="ffnfuse", options=options)
        given = batches(9)
        with torch.no_grad():
            before = made(**given[0]).logits
        meter = Meter(made, given)
        found = [meter(PLAN), meter.final(PLAN)]
        with torch.no_grad():
            after = made(**given[0]).logits
            expected = planned(llama(2), **other)(**given[0]).logits

        assert found == pytest.approx(2 * [truth(llama(2), given)], rel=1e-8)  # of the original, not of the compiled
        assert len(counter) == 1
        assert torch.equal(before, after)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-8)

    def test_and_the_process_are_left_as_they_were(self) -> None:
        model = llama(2).train()
        config = torch._dynamo.config
        before = (dict(vars(model)), config.recompile_limit, config.fail_on_recompile_limit_hit, config.suppress_errors)
        meter = Meter(model, batches())
        meter(PLAN)
        meter.final(PLAN)

        after = (dict(vars(model)), config.recompile_limit, config.fail_on_recompile_limit_hit, config.suppress_errors)
        assert after == before
        assert all(module.training for module in model.modules())

    def test_is_traced_once_whatever_the_number_of_plans(self) -> None:
        model = llama(2)
        meter = Meter(model, batches())
        with torch._dynamo.config.patch(accumulated_recompile_limit=1):
            assert all(meter(Plan(drop=[name])) > 0 for name in BRANCHES)

    def test_is_freed_with_its_packed_weights(self) -> None:
        model = llama(2)
        gone = [weakref.ref(model), weakref.ref(model.lm_head.weight)]
        meter = Meter(model, batches())
        meter(PLAN)
        meter.final(PLAN)
        gc.collect()
        packs = [pack for pack in _PACKS.values() if any(id(own) in pack.ids for own in model.parameters())]
        assert packs == []
        del meter, model
        gc.collect()
        assert [each() for each in gone] == [None, None]


class TestPlanned:
    def test_keeps_hooks_and_a_forward_of_the_instances_own(self) -> None:
        class Inner(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                raise AssertionError("the instance has another")

        model, x = Inner(), torch.ones(1, 2)
        model.forward = lambda x: 2 * x  # type: ignore[method-assign]
        model.register_forward_hook(lambda module, args, output: output + 1)

        assert torch.equal(Planned(model)(x=x), torch.full((1, 2), 3.0))  # type: ignore[arg-type]
        with compiled(model, Plan()) as made:
            assert torch.equal(made(x), torch.full((1, 2), 3.0))  # type: ignore[arg-type]


def test_a_replay_reads_only_what_is_asked_for_and_gives_the_same_again() -> None:
    read = []

    def source() -> Iterator[dict[str, object]]:
        for index in range(9):
            read.append(index)
            yield {"k": index}

    replay = Replay(source())
    assert [batch["k"] for batch, _ in zip(replay, range(2), strict=False)] == [0, 1]
    assert len(read) <= 3
    assert [batch["k"] for batch in replay] == list(range(9))
    assert [batch["k"] for batch in replay] == list(range(9))
    assert read == list(range(9))
