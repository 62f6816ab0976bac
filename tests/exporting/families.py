"""Tiny causal language models with random weights, float64, of architectures that differ in what surrounds a branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.models.tiny import redraw

LAYERS, VOCABULARY = 6, 64

_SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}

_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}

_FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {}),
    "biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "phi3": ("Phi3", {}),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 6, "layer_types": [*["sliding_attention"] * 5,
                                                                               "full_attention"]}),
    "granite": ("Granite", {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 3.0,
                            "logits_scaling": 2.0, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {}),
    "moe": ("DeepseekV3", {**_MLA, **_EXPERTS, "num_key_value_heads": 4, "first_k_dense_replace": 4}),
}  # fmt: skip

_WAYS = {"experts_implementation": "batched_mm"}
"""The default knows no float64, and the plainest one breaks graphs."""


def tiny(family: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A model of the family, with ``more`` entries of its config."""
    name, own = _FAMILIES[family]
    config = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    made = getattr(transformers, config)(**{**_SIZES, **own, **more})
    # Made in its dtype, as one that is loaded: what is no weight (the scale of Gemma's embedding) has that, too.
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype, **_WAYS).eval()
    redraw(model)
    return model


def loaded(folder: object, dtype: torch.dtype = torch.float64) -> Any:
    """The model of a folder as a user loads it, and nothing is missing or left over."""
    made, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, output_loading_info=True, **_WAYS
    )
    assert not any(told.values()), told
    return made.eval()


def tokens(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(5))


def greedy(model: Any, count: int = 12) -> Tensor:
    """What the model says after some tokens."""
    made: Tensor = model.generate(tokens(), max_new_tokens=count, do_sample=False)
    return made


@torch.no_grad()
def difference(one: Callable[..., Any], other: Callable[..., Any]) -> float:
    return float((one(input_ids=tokens()).logits - other(input_ids=tokens()).logits).abs().max())
