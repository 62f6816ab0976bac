"""A sample of the zoo, one of each kind of structure; `make zoo` runs them all and writes docs/architectures.md."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.models.well_known import LAYERS as BY_HAND
from tests.models.well_known import NanoGPT
from tests.zoo.anatomy import Block, Site, dissect
from tests.zoo.check import EXACT, OFF, Result, check
from tests.zoo.configs import HEADS, LAYERS, WIDTH, tiny
from tests.zoo.nets import entries
from tests.zoo.page import page
from tests.zoo.reference import in_parallel, outputs

ALL = entries()


@pytest.mark.parametrize(
    ("name", "ffns", "attentions", "fate"),
    [
        ("TorchtuneDecoder", 6, 6, {"wide"}),
        ("GPT2LMHeadModel", 6, 6, {"wide"}),  # Conv1D
        ("OPTForCausalLM", 6, 6, {"wide"}),  # flattens the stream for its FFNs
        ("Phi3ForCausalLM", 6, 6, {"wide"}),  # packed gate and up
        ("GPTJForCausalLM", 6, 6, {"wide"}),  # attention and FFN in parallel
        ("GraniteForCausalLM", 6, 6, {"wide"}),  # multipliers
        ("Gemma2ForCausalLM", 6, 6, {"gate_up"}),  # sandwich norms
        ("Dinov2Model (SwiGLU)", 6, 6, {"wide"}),  # an encoder of images, with a gain on each channel
    ],
)
def test_a_net_is_understood_and_its_plan_is_computed(name: str, ffns: int, attentions: int, fate: set[str]) -> None:
    result = check(ALL[name])

    assert not result.failed and not result.unplanned
    assert result.parts == {"attention": attentions, "ffn": ffns}
    assert result.kinds.get("attention") == attentions
    assert result.kinds.get("ffn", 0) + result.kinds.get("gated_ffn", 0) == ffns
    assert not result.miscounted
    assert set((result.single or result.fused).values()) == fate
    assert result.exact and result.planned_error is not None
    assert result.linear == EXACT
    assert result.narrow == EXACT or (fate == {"gate_up"} and "not a linear projection but a norm" in result.narrow)


def test_every_causal_language_model_is_in_the_zoo() -> None:
    names = {name for name, entry in ALL.items() if entry.origin == "transformers"}

    assert {"LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "MambaForCausalLM"} <= names
    assert len(names) > 150


def test_configurations_become_tiny_whatever_their_attributes_are_called() -> None:
    from transformers import GPT2Config, LlamaConfig, MptConfig

    for kind in (LlamaConfig, GPT2Config, MptConfig):
        config = tiny(kind)
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (WIDTH, LAYERS, HEADS)
    assert tiny(LlamaConfig, num_hidden_layers=3).num_hidden_layers == 3


def _tokens() -> dict[str, Tensor]:
    return {"tokens": torch.arange(3, 19).view(2, 8)}


def test_parts_are_told_by_the_tree_of_modules() -> None:
    anatomy = dissect(NanoGPT(), _tokens())

    assert anatomy.calls == {"attention": BY_HAND, "ffn": BY_HAND, "mixer": 0, "moe": 0, "shared": 0}
    (stack,) = anatomy.stacks
    assert [(site.path, site.part) for site in stack[2].sites] == [("h.2.attn", "attention"), ("h.2.mlp", "ffn")]


def test_the_reference_is_what_the_layers_compute_from_one_point() -> None:
    """Against the same written down by hand."""
    model = NanoGPT().double().eval()
    (stack,) = dissect(model, _tokens()).stacks
    with in_parallel(stack[2:4]):
        found = outputs(model, _tokens())

    tokens = _tokens()["tokens"]
    with torch.no_grad():
        x = model.wte(tokens) + model.wpe(torch.arange(8))
        for index, block in enumerate(model.h):
            if index == 2:
                x = x + sum(model.h[k].mlp(model.h[k].ln_2(x)) for k in (2, 3))  # type: ignore[operator, union-attr]
            elif index != 3:
                x = block(x)
        expected = model.lm_head(model.ln_f(x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(outputs(model, _tokens()), expected)


def test_the_reference_refuses_layers_that_are_not_of_one_stream() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x) + self.layers[1](x)

    model = Apart()
    paths = [f"layers.{i}" for i in range(2)]
    sites = [Site(path, "ffn", layer, 1) for path, layer in zip(paths, model.layers, strict=True)]
    blocks = [Block(site.path, site.last, (site,)) for site in sites]

    with pytest.raises(ValueError, match="does not follow"), in_parallel(blocks):
        model(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("change", "exact"),
    [
        ({}, True),
        ({"planned_error": 1e-7}, False),
        ({"empty_error": 1e-7}, False),
        ({"empty_error": None}, False),
        ({"effect": 0.0}, False),  # a plan that changes nothing proves nothing
        ({"ratio": 1.9}, True),
        ({"ratio": 2.1}, False),
        ({"narrow": "refused: its experts are routed", "linear": EXACT}, True),
        ({"narrow": OFF + "2e-03"}, False),
    ],
)
def test_a_net_is_exact_if_all_was_compared_and_told_something(
    change: dict[str, float | str | None], exact: bool
) -> None:
    result = Result("Good", "by hand", built=True, empty_error=0.0, planned_error=1e-12, effect=0.3)

    assert replace(result, **change).exact == exact  # type: ignore[arg-type]


def test_counts_that_differ_are_told() -> None:
    result = Result("Net", "by hand", parts={"attention": 2, "ffn": 1, "moe": 1, "shared": 1})

    agree = replace(result, kinds={"attention": 2, "gated_ffn": 1, "ffn": 1, "moe": 1, "other": 3})
    assert agree.miscounted == ""
    assert replace(agree, kinds={"attention": 2, "ffn": 1, "moe": 1}).miscounted == "1 ffn of 2"


def test_the_page_says_what_is_wrong() -> None:
    fates = {"fused": {"a": "wide", "b": "wide"}, "narrow": EXACT, "linear": "refused: why"}
    good = Result("Good", "by hand", built=True, parts={"ffn": 2}, kinds={"ffn": 2}, graphs=1, empty_error=0.0,
                  planned_error=1e-12, **fates)  # fmt: skip  # type: ignore[arg-type]
    wrong = replace(good, name="Wrong", planned_error=0.5)
    unbuilt = Result("Unbuilt", "by hand", failed="ValueError: no | such size")

    text = page([good, wrong, unbuilt])

    assert "2 of 3 nets built; 1 exact" in text
    assert "In 2 an FFN was narrowed, in 0 an attention made linear." in text
    assert "| Good | 2/2 | 0/0 | 0/0 | wide | yes | no | exact |  |" in text
    assert "| Wrong |" in text and "**wrong**" in text
    assert "- Unbuilt: ValueError: no / such size" in text
