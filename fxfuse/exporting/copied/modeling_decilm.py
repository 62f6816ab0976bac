"""A Llama whose layers differ: some without attention or FFN, FFNs of any width (nemotron-nas).

Written by fxfuse for transformers 5. The keys and values of attentions are cached under numbers of their own, so that
what comes first in the cache is the first attention, whatever layers stand before it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)

from .configuration_decilm import DeciLMConfig, Entry, ffn_width


class DeciLMDecoderLayer(nn.Module):
    """An attention and an FFN, or one of them.

    Args:
        config: of the model.
        block: of this layer.
        number: of its attention, among those that there are.
    """

    def __init__(self, config: DeciLMConfig, block: Entry, number: int) -> None:
        super().__init__()
        self.has_attention, self.has_ffn = not block.attention.no_op, not block.ffn.no_op
        if self.has_attention:
            self.self_attn = LlamaAttention(config, number)
            for name in ("q_proj", "k_proj", "v_proj"):
                given = getattr(self.self_attn, name)
                setattr(self.self_attn, name, nn.Linear(given.in_features, given.out_features, bias=config.qkv_bias))
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.has_ffn:
            own = copy.copy(config)
            own.intermediate_size = ffn_width(block.ffn, config.hidden_size)
            self.mlp = LlamaMLP(own)
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if self.has_attention:
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        if self.has_ffn:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class DeciLMModel(LlamaModel):  # type: ignore[misc]  # transformers' classes have no types here
    """A Llama's model with these layers."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        with _without_layers(config):
            super().__init__(config)
        number = 0
        for block in config.block_configs:
            self.layers.append(DeciLMDecoderLayer(config, block, number))
            number += not block.attention.no_op
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):  # type: ignore[misc]  # nor has this one
    """A Llama's causal language model with these layers."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        with _without_layers(config):
            super().__init__(config)
        self.model = DeciLMModel(config)
        self.post_init()


@contextmanager
def _without_layers(config: DeciLMConfig) -> Iterator[None]:
    """What is built of ``config`` meanwhile has no layers."""
    count, config.num_hidden_layers = config.num_hidden_layers, 0
    try:
        yield
    finally:
        config.num_hidden_layers = count
