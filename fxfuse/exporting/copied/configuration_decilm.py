"""Configuration of a Llama whose layers differ: some without attention or FFN, FFNs of any width (nemotron-nas).

Written by fxfuse for transformers 5. NVIDIA's own files of this format are for transformers 4.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig


class Entry(SimpleNamespace):
    """A part of a block's configuration, whose entries are attributes, as engines read them."""


class DeciLMConfig(LlamaConfig):  # type: ignore[misc]  # transformers' classes have no types here
    """A Llama's configuration with ``block_configs``: for each layer its ``attention`` and its ``ffn``."""

    model_type = "nemotron-nas"
    base_model_tp_plan = None

    def __init__(self, block_configs: list[Any] | None = None, **kwargs: Any) -> None:
        blocks = [_entry(block) for block in block_configs or []]
        groups = [block.attention.n_heads_in_group for block in blocks if not block.attention.no_op]
        widths = [ffn_width(block.ffn, kwargs["hidden_size"]) for block in blocks if not block.ffn.no_op]
        if groups:
            kwargs["num_key_value_heads"] = kwargs["num_attention_heads"] // groups[0]
        # What is null in config.json: each layer has its own.
        kwargs["intermediate_size"] = max(widths, default=0)
        qkv_bias = kwargs.pop("qkv_bias", None)
        super().__init__(**kwargs)
        self.qkv_bias = self.attention_bias if qkv_bias is None else qkv_bias
        self.block_configs = blocks

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON has it."""
        made: dict[str, Any] = super().to_dict()
        made["block_configs"] = [_plain(block) for block in self.block_configs]
        return made


def ffn_width(ffn: Entry, hidden_size: int) -> int:
    """Hidden units of an FFN: its multiplier, rounded up to a multiple of 256."""
    width = int(2 * ffn.ffn_mult * hidden_size / 3)
    return width + -width % 256


def _entry(value: Any) -> Any:
    return Entry(**{key: _entry(held) for key, held in value.items()}) if isinstance(value, dict) else value


def _plain(value: Any) -> Any:
    return {key: _plain(held) for key, held in vars(value).items()} if isinstance(value, Entry) else value
