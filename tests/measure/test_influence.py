from __future__ import annotations

from typing import Any

import pytest
import torch

from fxfuse.errors import PlanError, RecordError
from fxfuse.measure.influence import block_influence
from tests.models.tiny import llama, tokens

BLOCKS = [(f"model.layers.{k}.self_attn", f"model.layers.{k}.mlp") for k in range(3)]


def test_it_is_what_hooks_on_the_layers_see() -> None:
    model, seen = llama(3), list[torch.Tensor]()
    batches: list[dict[str, Any]] = [{"input_ids": tokens(2, 6, seed=k), "use_cache": False} for k in (1, 2)]
    found = block_influence(model, batches, BLOCKS)

    for k, block in enumerate(BLOCKS):
        seen.clear()

        def see(_: object, args: tuple[Any, ...], output: Any) -> None:
            seen.append(1 - torch.cosine_similarity(args[0], output if output.dim() == 3 else output[0], dim=-1))

        hook = model.model.layers[k].register_forward_hook(see)
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        hook.remove()
        assert found[block] == pytest.approx(float(torch.cat(seen).mean()), rel=1e-5)


def test_no_such_branch_and_no_batch_are_errors() -> None:
    with pytest.raises(PlanError, match="no branch 'mlp'"):
        block_influence(llama(1), [{"input_ids": tokens()}], [("mlp",)])
    with pytest.raises(RecordError, match="at least one batch"):
        block_influence(llama(1), [], BLOCKS[:1])
