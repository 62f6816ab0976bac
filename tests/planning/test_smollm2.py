"""The trained model's known trap: FFNs 8 to 10 look as independent as others, and ruin the model in parallel."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable

import pytest
import torch

import fxfuse
from fxfuse import Plan
from fxfuse.data.loading import Loaded
from fxfuse.planning import Choices, Limits, decide, plan_of, propose_groups
from tests.model.test_pruning import attentions
from tests.models.tiny import planned


def mlps(*layers: int) -> tuple[str, ...]:
    return tuple(f"model.layers.{layer}.mlp" for layer in layers)


BUDGET = 1.2
TRAP, GOOD = mlps(8, 9, 10), mlps(12, 13, 14)


@pytest.mark.slow
def test_a_group_that_only_measuring_finds_out_is_refused(smollm2: Callable[[torch.dtype], Loaded]) -> None:
    loaded = smollm2(torch.float32)
    assert loaded.tokenizer is not None
    ids = torch.tensor(loaded.tokenizer.encode(pydoc_data.topics.topics["assignment"]))[None]
    first, *batches = ({"input_ids": part, "use_cache": False} for part in ids[:, :160].split((32, 64, 64), 1))
    drops, limits = Plan(drop=attentions(9, 10, 13, 14)), Limits(max_distance=0.3)

    recording = fxfuse.record(loaded.model, [first], drops, max_group=0)
    assert set(propose_groups(recording, (), limits)) == {TRAP, GOOD}

    decisions = decide(recording, Choices(drop=0, limits=limits, max_kl=BUDGET), loaded.model, batches)
    found = {decision.branches: decision for decision in decisions}
    assert (found[TRAP].outcome, found[GOOD].outcome) == ("split", "kept")
    assert (found[TRAP].added or 0) > 4 * (found[GOOD].added or 0) > 0

    plan = plan_of(recording, decisions)
    made = planned(loaded.model, plan.drop, plan.parallel)  # type: ignore[arg-type]  # of names alone
    cost = fxfuse.evaluate(made, batches, loaded.model).kl
    assert cost is not None and cost <= BUDGET
    assert max(decision.kl or 0 for decision in decisions if decision.outcome == "kept") == pytest.approx(
        cost, rel=1e-3
    )
