"""The real trained model, in float64, under three plans; the references are made of its own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxfuse
from fxfuse import Plan
from fxfuse.data.batches import cache_of
from fxfuse.data.loading import Loaded
from tests.model.test_pruning import attentions, greedy
from tests.models.checks import assert_exact
from tests.models.tiny import Counter, planned

TEXT = "The three laws of motion say that a body"


def mlps(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.mlp" for layer in layers]


FUSION = {"drop": attentions(5, 6, 7), "parallel": [mlps(4, 5, 6, 7)]}
PAIRS = {"parallel": [attentions(12, 13), mlps(12, 13)]}
BLOCKS = {"parallel": [[[*attentions(12), *mlps(12)], [*attentions(13), *mlps(13)]]]}


@pytest.fixture(scope="module")
def smol(smollm2: Callable[[torch.dtype], Loaded]) -> Loaded:
    return smollm2(torch.float64).with_tokens(TEXT, batch=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "fused"),
    [(FUSION, [tuple(mlps(4, 5, 6, 7))]), (PAIRS, [tuple(mlps(12, 13))]), (BLOCKS, [])],
    ids=["ffn fusion", "layer pairs", "full blocks"],
)
def test_the_planned_model_equals_the_reference(
    plan: dict[str, Any], fused: list[tuple[str, ...]], smol: Loaded
) -> None:
    reference, counter = planned(smol.model, **plan), Counter()
    options = {"plan": Plan(**plan), "inner": counter, "strict": True}
    made = torch.compile(smol.model, backend="ffnfuse", options=options)
    with torch.no_grad():
        found = made(**smol.kwargs).logits
        expected = reference(**smol.kwargs).logits
        unplanned = smol.model(**smol.kwargs).logits

    assert_exact([found], [expected])
    assert (unplanned - expected).abs().max() > 1e-3 * expected.abs().max(), "the plan changes nothing"
    (gm,) = counter.graphs
    done = {report.name: [edit.branches for edit in report.done] for report in gm.meta["fxfuse_reports"]}
    assert done["fuse_ffn"] == fused


@pytest.mark.slow
def test_an_applied_plan_generates_the_tokens_of_the_reference(smol: Loaded) -> None:
    model = copy.deepcopy(smol.model)
    reference = planned(smol.model, **FUSION)
    before = sum(each.numel() for each in model.parameters())
    attention = sum(each.numel() for each in model.model.layers[5].self_attn.parameters())
    fxfuse.apply(model, Plan(**FUSION), inner="eager", strict=True)
    ids = smol.kwargs["input_ids"][:1]
    found, expected = (greedy(each, ids, count=12) for each in (model, reference))

    assert torch.equal(found[0], expected[0])
    assert_exact(found[1], expected[1])
    assert sum(each.numel() for each in model.parameters()) == before - 3 * attention
    with torch.no_grad():
        cache: Any = cache_of(model(ids, use_cache=True))
    assert [index for index, layer in enumerate(cache.layers) if not layer.is_initialized] == [5, 6, 7]
