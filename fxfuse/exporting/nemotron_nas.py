"""nemotron-nas: a Llama whose layers differ, which vLLM, llama.cpp and others serve natively.

A layer may lack its attention or its FFN, and each FFN has a width of its own, a multiple of 256: hidden units that
contribute exactly nothing fill it up. The format is NVIDIA's, of Llama-3.1-Nemotron-Ultra-253B, where fused FFNs stand
in layers without attention.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import nn

from fxfuse._common.progress import bar
from fxfuse.errors import ExportError
from fxfuse.exporting import copied
from fxfuse.exporting.check import check_folder
from fxfuse.exporting.layout import Attention, GatedFFN, Layout
from fxfuse.exporting.llama import llama_layout
from fxfuse.exporting.request import Request
from fxfuse.exporting.scalars import scalars_of
from fxfuse.exporting.stream import Planned
from fxfuse.exporting.tensors import write_weights
from fxfuse.exporting.weights import Weight, filled, stacked

MULTIPLE = 256
"""Widths of FFNs are rounded up to a multiple of this by whoever reads the format."""

_FILES = ("configuration_decilm.py", "modeling_decilm.py")


def prepare(request: Request) -> Callable[[Path], None]:
    """See that the planned model can be said, and return what writes it.

    Raises:
        ExportError: the format cannot say it.
    """
    request.no_options("nemotron-nas")
    planned = request.planned()
    config, weights = checkpoint(planned, request.model)

    def write(folder: Path) -> None:
        for name in _FILES:
            shutil.copyfile(Path(copied.__path__[0]) / name, folder / name)
        total = sum(weight.size for weight in weights.values())
        with bar("writing weights", "bytes", total, request.progress) as done:
            write_weights(folder, weights, done=done)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if request.check:
            from fxfuse.exporting.copied.modeling_decilm import DeciLMForCausalLM

            check_folder(folder, DeciLMForCausalLM, planned, request)

    return write


def checkpoint(planned: Planned, model: nn.Module) -> tuple[dict[str, object], dict[str, Weight]]:
    """The config of the planned model and its weights by name, none of which is made yet.

    Raises:
        ExportError: the format cannot say it.
    """
    layout = llama_layout(planned)
    config = _config(layout, model)
    return config, dict(_weights(layout, config))


def _config(layout: Layout, model: nn.Module) -> dict[str, object]:
    scalars = scalars_of(model)
    held = layout.attentions
    if not held or layout.blocks[0].attention is not held[0]:
        raise ExportError(
            "the first layer is left without its attention, and engines that read nemotron-nas take the number of "
            "key-value heads from there; the format 'transformers' can say it"
        )
    linear = next((b.attention for b in layout.blocks if b.attention and not isinstance(b.attention, Attention)), None)
    if linear is not None:
        raise ExportError(
            f"{linear.name!r} is a linear map, and engines that read nemotron-nas ignore that; the formats "
            "'transformers' and 'gguf' can say it"
        )
    first = held[0]
    if any(
        (each.heads, each.kv_heads, each.head_dim) != (first.heads, first.kv_heads, first.head_dim) for each in held
    ):
        raise ExportError("attentions have different numbers of heads, which engines do not read from nemotron-nas")
    if first.heads * first.head_dim != layout.width:
        raise ExportError(
            f"heads are {first.head_dim} wide, and nemotron-nas has them {layout.width} / {first.heads} wide"
        )
    ffns = [block.ffn for block in layout.blocks if block.ffn is not None]
    other = next((ffn for ffn in ffns if ffn.activation != "silu"), None)
    if other is not None:
        raise ExportError(f"{other.names[0]!r} has {other.activation} for its activation, and nemotron-nas silu")
    config: dict[str, object] = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModel": "modeling_decilm.DeciLMModel",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "block_configs": [
            {"attention": _attention(block.attention), "ffn": _ffn(block.ffn, layout.width)} for block in layout.blocks
        ],
        "hidden_size": layout.width,
        "intermediate_size": None,
        "num_hidden_layers": len(layout.blocks),
        "num_attention_heads": first.heads,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "qkv_bias": any(bias is not None for each in held for bias in (each.q_bias, each.k_bias, each.v_bias)),
        "attention_bias": any(each.o_bias is not None for each in held),
        "mlp_bias": any(bias is not None for each in ffns for bias in (each.gate_bias, each.up_bias, each.down_bias)),
        "rms_norm_eps": layout.eps,
        **scalars.rope,
        "max_position_embeddings": scalars.positions,
        "vocab_size": layout.embedding.shape[0],
        "tie_word_embeddings": layout.head is None,
        **scalars.tokens,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": str(layout.embedding.dtype).removeprefix("torch."),
    }
    return config


def _attention(attention: object) -> dict[str, object]:
    """NVIDIA's entry for an attention; only the first two are read."""
    held = isinstance(attention, Attention)
    return {
        "n_heads_in_group": attention.heads // attention.kv_heads if isinstance(attention, Attention) else None,
        "no_op": not held,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }


def _ffn(ffn: GatedFFN | None, width: int) -> dict[str, object]:
    made = None if ffn is None else round(1.5 * _padded(ffn.width) / width, 6)
    return {"ffn_mult": made, "no_op": ffn is None, "replace_with_linear": False, "sparsify": None}


def _padded(width: int) -> int:
    return width + -width % MULTIPLE


def _weights(layout: Layout, config: Mapping[str, object]) -> Iterator[tuple[str, Weight]]:
    yield "model.embed_tokens.weight", layout.embedding
    for number, block in enumerate(layout.blocks):
        path = f"model.layers.{number}"
        if isinstance(attention := block.attention, Attention):
            yield f"{path}.input_layernorm.weight", attention.norm
            yield from _linear(f"{path}.self_attn.q_proj", attention.q, attention.q_bias, config["qkv_bias"])
            yield from _linear(f"{path}.self_attn.k_proj", attention.k, attention.k_bias, config["qkv_bias"])
            yield from _linear(f"{path}.self_attn.v_proj", attention.v, attention.v_bias, config["qkv_bias"])
            yield from _linear(f"{path}.self_attn.o_proj", attention.o, attention.o_bias, config["attention_bias"])
        if (ffn := block.ffn) is not None:
            more = _padded(ffn.width) - ffn.width
            yield f"{path}.post_attention_layernorm.weight", ffn.norm
            yield from _linear(f"{path}.mlp.gate_proj", ffn.gate, ffn.gate_bias, config["mlp_bias"], more)
            yield from _linear(f"{path}.mlp.up_proj", ffn.up, ffn.up_bias, config["mlp_bias"], more)
            yield f"{path}.mlp.down_proj.weight", stacked([ffn.down], 1, more)
            if config["mlp_bias"]:
                yield f"{path}.mlp.down_proj.bias", ffn.down_bias or filled(0.0, (layout.width,), ffn.down.dtype)
    yield "model.norm.weight", layout.norm
    if layout.head is not None:
        yield "lm_head.weight", layout.head


def _linear(
    path: str, weight: Weight, bias: Weight | None, biased: object, more: int = 0
) -> Iterator[tuple[str, Weight]]:
    """A projection with so many rows of zeros ``more``; a bias of zeros where others have one."""
    yield f"{path}.weight", stacked([weight], 0, more)
    if biased:
        own = bias or filled(0.0, (weight.shape[0],), weight.dtype)
        yield f"{path}.bias", stacked([own], 0, more)
