"""GGUF of llama.cpp's architecture ``deci``: a Llama whose layers differ, in one file ``model.gguf``.

A layer has heads of its own and an FFN of a width of its own. One without heads has no attention, one with heads but no
key-value heads is a linear map: its norm, then ``attn_output``. Read off ``src/models/deci.cpp``, which throws an
attention away in silence where the layer has no FFN: there this writes one of hidden units that contribute exactly
nothing. Option ``type`` is that of matrices: "f32", "f16", "bf16" or "q8_0", by default the model's own; all else is
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxfuse._common.progress import bar
from fxfuse.errors import ExportError, MissingDependencyError, OptionError
from fxfuse.exporting.layout import Attention, Block, GatedFFN, Layout, LinearAttention
from fxfuse.exporting.llama import llama_layout
from fxfuse.exporting.request import Request
from fxfuse.exporting.scalars import scalars_of
from fxfuse.exporting.vocabulary import Fields, fields_of, write_fields
from fxfuse.exporting.weights import Weight, filled, stacked

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"

BLOCK = 32
"""Numbers that share a scale in Q8_0: rows are multiples of it, and so are widths of FFNs, filled up with zeros."""

_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}

_OWN = {torch.float64: "f32", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

_TURNED = ("default", "linear", "llama3")
"""Kinds of rotary angles that are those of a Llama, each frequency divided by a number of its own."""


def prepare(request: Request) -> Callable[[Path], None]:
    """See that the planned model can be said, and return what writes it.

    Raises:
        ExportError: the format cannot say it, or the tokenizer.
        OptionError: an option is unknown, or has a value that it cannot take.
        MissingDependencyError: the package gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise MissingDependencyError("gguf is needed to write this format: pip install 'fxfuse[hf]'")
    kind, vocabulary = _options(request)
    layout = _sayable(llama_layout(request.planned()))
    kind = kind or _OWN.get(layout.embedding.dtype, "f32")
    factors = _frequency_factors(request.model)
    fields = _fields(layout, request.model, kind)
    fields |= fields_of(request.tokenizer, vocabulary, layout.embedding.shape[0])
    weights = dict(_weights(layout, factors))
    _check_rows(weights, kind)

    def write(folder: Path) -> None:
        from gguf import GGUFWriter

        writer = GGUFWriter(folder / FILE, "deci")
        try:
            write_fields(writer, fields)
            _write_weights(writer, weights, kind, request.progress)
        finally:
            writer.close()

    return write


def _options(request: Request) -> tuple[str | None, Path | None]:
    """The type of matrices, None for the model's own; and the file to take the vocabulary from, if one was given."""
    known = {"type", "vocabulary"}
    for name in request.options:
        if name not in known:
            raise OptionError(f"the format 'gguf' knows no option {name!r}; it knows type and vocabulary")
    kind, vocabulary = request.options.get("type"), request.options.get("vocabulary")
    if kind is not None and kind not in _TYPES:
        raise OptionError(f"option 'type' is one of {', '.join(_TYPES)}, not {kind!r}")
    if vocabulary is not None and not isinstance(vocabulary, str | Path):
        raise OptionError(f"option 'vocabulary' is the path of a GGUF file, not {vocabulary!r}")
    return (None if kind is None else str(kind)), (None if vocabulary is None else Path(vocabulary))


def _sayable(layout: Layout) -> Layout:
    """The layout as blocks of which all have an FFN, the first an attention, and FFNs are multiples of `BLOCK` wide.

    Raises:
        ExportError: llama.cpp has no word for something in it.
    """
    for block in layout.blocks:
        if isinstance(block.attention, LinearAttention) and block.attention.o_bias is not None:
            raise ExportError(f"{block.attention.name!r} is a linear map with a bias, and llama.cpp adds none there")
        if block.ffn is not None and block.ffn.activation != "silu":
            raise ExportError(f"{block.ffn.names[0]!r} has {block.ffn.activation} for its activation, and deci silu")
    if not layout.attentions:
        raise ExportError("no attention is left, and llama.cpp serves no model without any")
    if len({each.head_dim for each in layout.attentions}) > 1:
        raise ExportError("attentions have heads of different widths, and deci has one width for all")
    width, dtype = layout.width, layout.embedding.dtype
    blocks = [Block(block.attention, _filled_up(block.ffn, width, dtype)) for block in layout.blocks]
    if blocks[0].attention is None:  # llama.cpp reads the rotary angles only where the first layer has heads
        nothing = LinearAttention("", filled(1.0, (width,), dtype), filled(0.0, (width, width), dtype), None)
        blocks[0] = Block(nothing, blocks[0].ffn)
    return replace(layout, blocks=tuple(blocks))


def _filled_up(ffn: GatedFFN | None, width: int, dtype: torch.dtype) -> GatedFFN:
    """The FFN with hidden units that contribute nothing, up to a multiple of `BLOCK`; of nothing else if it is None."""
    if ffn is None:
        rows = filled(0.0, (BLOCK, width), dtype)
        columns = filled(0.0, (width, BLOCK), dtype)
        return GatedFFN((), "silu", filled(1.0, (width,), dtype), rows, rows, columns, None, None, None)
    more = -ffn.width % BLOCK
    gate, up = stacked([ffn.gate], 0, more), stacked([ffn.up], 0, more)
    biases = [None if bias is None else stacked([bias], 0, more) for bias in (ffn.gate_bias, ffn.up_bias)]
    down = stacked([ffn.down], 1, more)
    return replace(ffn, gate=gate, up=up, down=down, gate_bias=biases[0], up_bias=biases[1])


def _frequency_factors(model: nn.Module) -> Tensor | None:
    """What each rotary frequency ``theta ** (-2i / head_dim)`` is divided by, ``[head_dim / 2]``; None if by 1.

    Raises:
        ExportError: the model's rotary angles are more than that.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = scalars_of(model).rope["rope_parameters"]
    assert isinstance(rope, Mapping)
    kind = rope.get("rope_type", "default")
    if kind not in _TURNED:
        raise ExportError(f"rotary angles are of the kind {kind!r}, and this format writes {', '.join(_TURNED)}")
    if kind == "default":
        return None
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](model.config, "cpu")
    assert scale == 1.0, "rotary angles scale what they turn"
    powers = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    factors: Tensor = (float(rope["rope_theta"]) ** -powers / frequencies.double()).float()
    return factors


def _fields(layout: Layout, model: nn.Module, kind: str) -> Fields:
    """The metadata but for the vocabulary, as llama.cpp names it."""
    import gguf

    scalars, first = scalars_of(model), layout.attentions[0]
    theta = scalars.rope["rope_theta"]
    assert isinstance(theta, int | float)
    counts = [_heads(block, first) for block in layout.blocks]
    file_type = gguf.LlamaFileType[_FILE_TYPES[kind]]
    return {
        "general.type": "model",
        "general.name": type(model).__name__.removesuffix("ForCausalLM") + " under a plan of fxfuse",
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "deci.block_count": len(layout.blocks),
        "deci.context_length": scalars.positions,
        "deci.embedding_length": layout.width,
        "deci.vocab_size": layout.embedding.shape[0],
        "deci.attention.head_count": [heads for heads, _ in counts],
        "deci.attention.head_count_kv": [kv_heads for _, kv_heads in counts],
        "deci.feed_forward_length": [block.ffn.width for block in layout.blocks if block.ffn is not None],
        "deci.attention.key_length": first.head_dim,
        "deci.attention.value_length": first.head_dim,
        "deci.rope.dimension_count": first.head_dim,
        "deci.rope.freq_base": float(theta),
        "deci.attention.layer_norm_rms_epsilon": float(layout.eps),
    }


def _heads(block: Block, first: Attention) -> tuple[int, int]:
    """Query and key-value heads: none for a layer without attention; no key-value heads for a linear map."""
    if isinstance(block.attention, Attention):
        return block.attention.heads, block.attention.kv_heads
    return (0, 0) if block.attention is None else (first.heads, 0)


def _weights(layout: Layout, factors: Tensor | None) -> Iterator[tuple[str, Weight]]:
    yield "token_embd", layout.embedding
    if factors is not None:
        yield "rope_freqs", Weight.own(factors, "")
    for number, block in enumerate(layout.blocks):
        for name, weight in _block(block):
            if weight is not None:
                yield f"blk.{number}.{name}", weight
    yield "output_norm", layout.norm
    if layout.head is not None:
        yield "output", layout.head


def _block(block: Block) -> Iterator[tuple[str, Weight | None]]:
    if isinstance(attention := block.attention, Attention):
        yield "attn_norm", attention.norm
        yield "attn_q", _paired(attention.q, attention.heads)
        yield "attn_q.bias", _paired(attention.q_bias, attention.heads)
        yield "attn_k", _paired(attention.k, attention.kv_heads)
        yield "attn_k.bias", _paired(attention.k_bias, attention.kv_heads)
        yield "attn_v", attention.v
        yield "attn_v.bias", attention.v_bias
        yield "attn_output", attention.o
        yield "attn_output.bias", attention.o_bias
    elif attention is not None:
        yield "attn_norm", attention.norm
        yield "attn_output", attention.o
    ffn = block.ffn
    assert ffn is not None
    yield "ffn_norm", ffn.norm
    yield "ffn_gate", ffn.gate
    yield "ffn_gate.bias", ffn.gate_bias
    yield "ffn_up", ffn.up
    yield "ffn_up.bias", ffn.up_bias
    yield "ffn_down", ffn.down
    yield "ffn_down.bias", ffn.down_bias


def _paired(weight: Weight | None, heads: int) -> Weight | None:
    """Rows of a head in llama.cpp's order: it turns features 2i and 2i + 1 together, transformers i and i + half."""
    if weight is None:
        return None

    def compute() -> Tensor:
        made = weight()
        return made.reshape(heads, 2, -1, *made.shape[1:]).transpose(1, 2).reshape(made.shape)

    return replace(weight, compute=compute)


def _is_matrix(weight: Weight) -> bool:
    return len(weight.shape) > 1


def _check_rows(weights: Mapping[str, Weight], kind: str) -> None:
    if kind != "q8_0":
        return
    for name, weight in weights.items():
        if _is_matrix(weight) and weight.shape[-1] % BLOCK:
            raise ExportError(
                f"rows of {name!r} are {weight.shape[-1]} long, and Q8_0 has blocks of {BLOCK}: give type='f16'"
            )


def _write_weights(writer: GGUFWriter, weights: Mapping[str, Weight], kind: str, progress: bool) -> None:
    """Announce all weights, then write them, one in memory at a time."""
    import gguf
    import numpy as np

    kinds = {
        name: gguf.GGMLQuantizationType[_TYPES[kind] if _is_matrix(weight) else "F32"]
        for name, weight in weights.items()
    }
    sizes = {}
    for name, weight in weights.items():
        numbers, per_block = gguf.GGML_QUANT_SIZES[kinds[name]]
        sizes[name] = int(np.prod(weight.shape)) // numbers * per_block
        full = name if name.endswith(".bias") else f"{name}.weight"
        writer.add_tensor_info(full, weight.shape, np.dtype(np.float32), sizes[name], raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with bar("writing weights", "bytes", sum(sizes.values()), progress) as done:
        for name, weight in weights.items():
            writer.write_tensor_data(gguf.quantize(weight().float().numpy(), kinds[name]))
            done(sizes[name])
