"""A tiny configuration of any transformers model: the defaults of its own class, shrunk by rules on attribute names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

LAYERS, WIDTH, HEADS, VOCABULARY = 6, 32, 4, 128

RULES: tuple[tuple[str, int], ...] = (
    (r".*token_(id|index)|.*_token", 1),
    (r".*vocab_size(_per_layer_input|_base)?|.*vocab|codebook_size", VOCABULARY),
    (r".*shared_layers|num_codebooks|.*expand", 1),
    (r"(.*_)?(num_|n_)?(hidden_)?(layers?|blocks)", LAYERS),
    (r"(.*_)?(n|num|topk|o)_(expert_)?groups?", 2),
    (r".*(experts_per_tok|experts_per_token|topk|top_k|shared_experts|moe_k)", 2),
    (r".*(kv_heads|key_value_heads|n_head_kv|query_groups)", 2),
    (r".*(key_heads|value_heads|num_heads|attention_heads|n_heads?|mamba_heads)", HEADS),
    (r".*experts", 4),
    (r".*(head_?dim|dim_head|d_head|head_size|rope_dim|rotary_dim|kv_channels)", WIDTH // HEADS),
    (r".*(intermediate_size(_mlp)?|ffn_dim|n_inner|ffn_hidden_size|dim_ff|d_ff)", 3 * WIDTH // 2),
    (r".*(hidden_size|hidden_size_global|embedding_size|d_model|n_embd|per_layer_input)", WIDTH),
    (r".*(embed|embedding|emb|embed_proj)_dim", WIDTH),
    (r"dim_model(_base)?|mamba_d_ssm|lru_width|input_size", WIDTH),
    (r".*(max_position_embeddings|n_positions|max_seq_len|_length|n_ctx|max_.*_positions)", 64),
    (r".*(rank|lowrank|state_size|d_state|window(_size|_len)?|block_size|chunk_?size|max_distance)", 8),
    (r"image_size|crop_size", 32),
    (r"patch_size", 8),
)
"""The first rule that fits the whole name of an attribute gives its value. Nothing is made larger than it is."""


def tiny(kind: type[PreTrainedConfig], fill: bool = False, **given: Any) -> PreTrainedConfig:
    """A configuration of ``kind`` with six layers of width 32.

    Args:
        kind: a class whose defaults are complete, or are so with ``fill``.
        fill: give sizes to the attributes that are None by default, too.
        given: attributes that go before the rules.
    """
    return _build(kind(), fill, given)


def _build(config: PreTrainedConfig, fill: bool, given: Mapping[str, Any]) -> PreTrainedConfig:
    made = {**_shrunk(config, fill), **given}
    small = type(config)(**made)
    # Lists with an entry for each layer that are not derived from the number of layers, but give it.
    own = {name: _window(value) for name, value in _values(small).items() if name not in given and _too_long(value)}
    return type(config)(**made, **own) if own else small


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    # Some attributes cannot be read, because each layer has its own.
    return {field.name: config.__dict__.get(field.name) for field in fields(config)}


def _shrunk(config: PreTrainedConfig, fill: bool) -> dict[str, Any]:
    defaults, values = {field.name: field.default for field in fields(config)}, _values(config)
    ungrouped = values.get("num_key_value_heads") == values.get("num_attention_heads")
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            found[name] = _build(value, fill, {})
            continue
        derived = defaults[name] is None  # by the class, from other attributes
        size = next((size for rule, size in RULES if re.fullmatch(rule, name)), None)
        if name == "num_key_value_heads" and ungrouped:
            size = HEADS
        if isinstance(value, int) and not isinstance(value, bool) and not derived:
            found[name] = value if size is None else min(size, value)
        elif value is None and fill and size is not None and not name.endswith("token_id"):
            found[name] = size
    return found


def _too_long(value: object) -> bool:
    return isinstance(value, list) and len(value) > LAYERS and all(isinstance(each, str | int | bool) for each in value)


def _window(values: Sequence[Any]) -> list[Any]:
    """As many neighbours as there are to be layers, with as many kinds among them as possible."""
    starts = range(len(values) - LAYERS + 1)
    best = max(starts, key=lambda start: (len({*values[start : start + LAYERS]}), -start))
    return list(values[best : best + LAYERS])
