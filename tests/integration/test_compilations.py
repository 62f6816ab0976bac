"""The rewritten model is compiled no more often than the model itself would be, for the same calls."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from fxfuse import Plan
from tests.models.tiny import Counter, Tower, llama, tokens, vectors

SHAPES = [(batch, length) for batch in (1, 2, 3, 4) for length in (1, 2, 3, 5, 8, 17, 64, 199, 200)]
MIXED = random.Random(0).sample(SHAPES, len(SHAPES))
PLAN = {"drop": ["model.layers.1.self_attn"], "parallel": [["model.layers.0.mlp", "model.layers.1.mlp"]]}


@pytest.fixture(autouse=True)
def own_limits() -> Any:
    """Nothing here may come near the limit, or the counts would say nothing."""
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True, suppress_errors=False):
        yield


def compilations(model: Any, calls: Iterable[Any], **options: Any) -> int:
    """How many graphs torch.compile asks its backend for; ``options`` are those of ffnfuse, none means no ffnfuse."""
    torch._dynamo.reset()
    counter = Counter()
    if options:
        model.compile(backend="ffnfuse", options=options | {"inner": counter})
    else:
        model.compile(backend=counter)
    for call in calls:
        call(model)
    return len(counter)


@pytest.mark.parametrize("order", [sorted(SHAPES), sorted(SHAPES, reverse=True), MIXED], ids=["up", "down", "mixed"])
@pytest.mark.parametrize(("weights", "grad"), [("copy", False), ("share", True)], ids=["copy", "share, with gradients"])
def test_a_tower_is_compiled_as_often_as_with_eager_for_all_shapes(
    order: list[tuple[int, int]], grad: bool, weights: str
) -> None:
    def call(batch: int, length: int) -> Any:
        def run(model: Any) -> None:
            with torch.set_grad_enabled(grad):
                model(vectors(batch, length, 8))

        return run

    calls = [call(*shape) for shape in order]
    model = Tower(3)
    expected = compilations(Tower(3), calls)
    found = compilations(model, calls, plan=Plan(parallel=[model.mlps]), weights=weights)

    assert 0 < found <= expected


@pytest.mark.slow
def test_a_llama_is_compiled_as_often_as_with_eager_for_all_shapes() -> None:
    def call(batch: int, length: int) -> Any:
        def run(model: Any) -> None:
            with torch.no_grad():
                model(tokens(batch, length), use_cache=False)

        return run

    calls = [call(*shape) for shape in MIXED]
    expected = compilations(llama(2, torch.float32), calls)
    found = compilations(llama(2, torch.float32), calls, plan=Plan(**PLAN), strict=True)

    assert 0 < found <= expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_mixed_generate_is_compiled_as_often_as_with_eager(kind: str) -> None:
    def call(batch: int, length: int) -> Any:
        return lambda model: model.generate(
            tokens(batch, length), max_new_tokens=4, do_sample=False, cache_implementation=kind
        )

    calls = [call(*shape) for shape in ((1, 5), (2, 9), (1, 1), (3, 2))]
    expected = compilations(llama(2, torch.float32), calls)
    found = compilations(llama(2, torch.float32), calls, plan=Plan(**PLAN), strict=True)

    assert 0 < found <= expected
