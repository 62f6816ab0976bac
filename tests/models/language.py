"""A language model of two blocks that takes a moment to trace, and what one plan means for it. Never imports fxfuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.blocks import WIDTH, Block, ready

VOCABULARY = 11

EDITS: dict[str, Any] = {"drop": ["layers.1.attn"], "parallel": [["layers.0.mlp", "layers.1.mlp"]]}


class Language(nn.Module):
    """Logits of the next token, float64; the head has weights of its own."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))

    def hidden(self, input_ids: Tensor) -> Tensor:
        """What the head reads."""
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)

    def planned_hidden(self, input_ids: Tensor) -> Tensor:
        """The same under ``EDITS``, of a model of two layers."""
        first, second = self.layers
        assert isinstance(first, Block) and isinstance(second, Block)
        h = self.embed(input_ids)
        h = h + first.attn(first.attn_norm(h))
        return self.norm(h + first.mlp(first.mlp_norm(h)) + second.mlp(second.mlp_norm(h)))


def language(layers: int = 2, seed: int = 0) -> Language:
    """One whose logits are far from uniform."""
    model = ready(Language(layers), seed)
    assert isinstance(model, Language)
    with torch.no_grad():
        model.head.weight *= 3
    return model


def sentences(count: int, batch: int = 2, length: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, VOCABULARY, (batch, length), generator=generator)} for _ in range(count)]
