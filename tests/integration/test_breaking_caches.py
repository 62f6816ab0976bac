"""KV caches that break the graph in each attention, as transformers' quantized one does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from transformers import DynamicCache

import fxfuse
from fxfuse import Plan
from tests.models.checks import assert_exact
from tests.models.tiny import llama, planned, tokens

ATTENTION = "model.layers.1.self_attn"


class Coarse(DynamicCache):
    """Keys and values are rounded, out of Dynamo's sight."""

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **given: Any) -> tuple[Tensor, Tensor]:
        torch._dynamo.graph_break()
        return super().update((keys * 64).round() / 64, (values * 64).round() / 64, *rest, **given)


@torch.no_grad()
def conversed(model: Any, config: Any) -> Tensor:
    """A prefill and three decode steps."""
    cache, ids, made, done = Coarse(config=config), tokens(1, 8), [], 0
    for size in (5, 1, 1, 1):
        made.append(model(ids[:, done : done + size], past_key_values=cache, use_cache=True).logits)
        done += size
    return torch.cat(made, 1)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(drop=[ATTENTION]),
        Plan(drop=[ATTENTION], parallel=[["model.layers.0.mlp", "model.layers.1.mlp"]]),
    ],
)
def test_a_plan_is_refused_and_says_why(plan: Plan) -> None:
    model = llama(3)
    compiled = torch.compile(model, backend="ffnfuse", options={"plan": plan, "inner": "eager"})

    with pytest.raises(BackendCompilerFailed, match="a graph break"):
        conversed(compiled, model.config)


def test_a_model_that_was_pruned_and_compiled_is_the_pruned_model() -> None:
    model = llama(3)
    pruned: Any = fxfuse.prune(copy.deepcopy(model), Plan(drop=[ATTENTION]))

    made = conversed(torch.compile(pruned, backend="ffnfuse", options={"inner": "eager"}), pruned.config)

    assert_exact(made, conversed(pruned, pruned.config))
    with torch.no_grad():
        exact = planned(model, [ATTENTION], [])(tokens(1, 8), use_cache=False).logits
    assert (made - exact).abs().max() < 0.1 * exact.abs().max()  # keys and values are rounded
    assert (made - exact).abs().max() > 1e-6 * exact.abs().max()
