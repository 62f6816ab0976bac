from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse import Plan
from fxfuse.errors import HealError
from fxfuse.healing.alone import maps_alone
from fxfuse.healing.fit import fit_step
from fxfuse.healing.pair import pairs
from fxfuse.healing.steps import Outcome, Sample, front_to_back
from fxfuse.healing.text import kinds
from tests.models.checks import assert_exact
from tests.models.tiny import llama, tokens

ATTENTIONS = [f"model.layers.{n}.self_attn" for n in range(3)]


def text(count: int = 8) -> list[dict[str, object]]:
    return [{"input_ids": tokens(2, 24, seed), "use_cache": False} for seed in range(count)]


def first_step(model: Any, plan: Plan, batches: list[dict[str, object]]) -> dict[str, Tensor]:
    """What the fit of the plan finds at its first sum."""
    (kind,) = kinds(batches, 0.25, list)
    made: dict[str, Tensor] = {}
    marked = [(held, batch) for held in (False, True) for batch in kind.part(held)]
    pair_of = pairs(model, plan, [batch for _, batch in marked])
    samples = [Sample(pair, "", held) for pair, (held, _) in zip(pair_of, marked, strict=True)]

    def keep(weights: Any, outcome: Outcome) -> None:
        if not made:
            made.update(weights)

    front_to_back(samples, partial(fit_step, block=4096), keep=keep)
    return made


@pytest.mark.parametrize("base", [Plan(), Plan(drop=["model.layers.1.mlp"])])
def test_each_map_is_what_the_fit_of_it_alone_finds(base: Plan) -> None:
    model = llama(3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = maps_alone(model, Plan(linear=ATTENTIONS, drop=base.drop), kinds(text(), 0.25, list))
    assert list(found) == ATTENTIONS
    for name in ATTENTIONS[:2] if base else ATTENTIONS:  # the stream of the original comes after a drop
        alone = first_step(model, Plan(linear=[name]), text())
        assert list(found[name]) == [f"{name}.o_proj.weight"] == list(alone)
        assert_exact(list(found[name].values()), list(alone.values()))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_too_little_text_is_named() -> None:
    with pytest.raises(HealError, match="tokens to fit to are too few"):
        maps_alone(llama(2), Plan(linear=ATTENTIONS[:1]), kinds(short(), 0.5, list))


def short() -> list[dict[str, object]]:
    return [{"input_ids": tokens(1, 4, seed), "use_cache": False} for seed in range(2)]


def test_without_a_linear_attention_there_is_nothing_to_fit() -> None:
    with pytest.raises(HealError, match="nothing in the model can be healed at its linear"):
        maps_alone(llama(2), Plan(drop=ATTENTIONS[:1]), kinds(text(), 0.25, list))
