"""A user's model as a layout: off the graph and off one call, whatever its class is called."""

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Plan
from fxfuse.errors import CaptureError
from fxfuse.hardware.layout import Shape, planned
from fxfuse.model.pruning import prune
from fxfuse.report.shapes import layout_of
from tests.models.tiny import gemma3, llama, tokens

HIDDEN, WIDTH, VOCABULARY = 32, 40, 50
ATTENTION = HIDDEN * (4 + 2 + 2 + 4) * 8
"""Four heads of queries and output, two of keys and of values, of 8 numbers."""


def test_a_llama_is_its_branches_its_cache_and_its_tables() -> None:
    layout = layout_of(llama(2), tokens(2), "a llama")
    assert (layout.name, layout.d, layout.vocabulary, layout.tied) == ("a llama", HIDDEN, VOCABULARY, False)
    assert layout.shapes[:2] == (
        Shape("model.layers.0.self_attn", "attention", ATTENTION, cache=2 * 2 * 8, heads=2),
        Shape("model.layers.0.mlp", "ffn", 3 * HIDDEN * WIDTH, WIDTH, joins=True),
    )
    matrices = sum(parameter.numel() for parameter in llama(2).parameters() if parameter.dim() > 1)
    assert layout.weights == matrices


def test_tied_tables_windows_and_ffns_that_cannot_join() -> None:
    model = gemma3(2, window=4)
    layout = layout_of(model, tokens(2), "a gemma")
    assert layout.tied
    assert layout.weights == sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert {shape.cache for shape in layout.shapes if shape.kind == "attention"} == {2 * 2 * 8}
    assert not any(shape.joins for shape in layout.shapes)  # a norm comes after the down projection


def test_a_plan_on_the_layout_is_the_layout_of_the_pruned_model() -> None:
    model = llama(3)
    names = [f"model.layers.{block}.self_attn" for block in (1, 2)]
    expected = planned(layout_of(model, tokens(2), "it"), Plan(drop=names[:1]))
    assert layout_of(prune(model, Plan(drop=names[:1])), tokens(2), "it") == expected


def test_an_applied_group_is_looked_past() -> None:
    model = llama(3)
    before = layout_of(model, tokens(2), "it")
    group = [f"model.layers.{block}.mlp" for block in (1, 2)]
    fxfuse.apply(model, Plan(drop=["model.layers.2.self_attn"], parallel=[group]), inner="eager")
    assert layout_of(model, tokens(2), "it") == planned(before, Plan(drop=["model.layers.2.self_attn"]))


class Silent(nn.Module):
    """An embedding, one FFN and a head; takes ``use_cache`` and returns a tensor alone."""

    def __init__(self, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        h = self.embed(input_ids)
        f = self.down(torch.relu(self.up(h)))
        return self.head(h + f if self.residual else f)


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(CaptureError, match="it returns no logits"):
        layout_of(Silent(), tokens(2), "it")
    with pytest.raises(CaptureError, match="it has 0 residual streams"):
        layout_of(Silent(residual=False), tokens(2), "it")
