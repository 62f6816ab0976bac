from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfuse.data.own_text import written_by
from fxfuse.errors import OptionError, RecordError
from tests.models.tiny import llama


class Bigrams(nn.Module):
    """After token t comes t + 1, as good as always."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(40 * torch.eye(9).roll(1, 1))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.weight[input_ids]


def test_a_model_without_generate_writes_what_it_finds_likely() -> None:
    (first, second) = written_by(Bigrams(), tokens=60, length=12, batch=4)

    for batch, rows in ((first, 4), (second, 1)):
        ids: Any = batch["input_ids"]
        assert ids.shape == (rows, 12) and batch.keys() == {"input_ids"}
        assert torch.equal(ids[:, 1:], (ids[:, :-1] + 1) % 9)


def test_a_seed_writes_one_text_and_leaves_the_generator_alone() -> None:
    model = llama(2).train()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (written_by(model, 64, 16, seed=seed)[0] for seed in (1, 1, 2))

    assert torch.equal(torch.rand(3), wanted) and model.training
    assert one["use_cache"] is False
    assert torch.equal(one["input_ids"], same["input_ids"])  # type: ignore[arg-type]
    assert not torch.equal(one["input_ids"], other["input_ids"])  # type: ignore[arg-type]


def test_it_does_not_stop_at_the_end_of_a_text() -> None:
    model = llama(2)
    model.generation_config.eos_token_id = list(range(50))
    (batch,) = written_by(model, 32, 16)
    assert batch["input_ids"].shape == (2, 16)  # type: ignore[attr-defined]


def test_bad_sizes_and_models_are_named() -> None:
    with pytest.raises(OptionError, match="tokens"):
        written_by(Bigrams(), 0)
    with pytest.raises(RecordError, match="batch 0"):
        written_by(nn.Linear(2, 2), 8)
