"""The vocabulary of a GGUF file: taken from another GGUF file, or made of a Hugging Face tokenizer of byte-level BPE.

llama.cpp has tokenizers of its own, and a file says by a name how text is split before BPE. The names stand for regular
expressions in ``src/llama-vocab.cpp``; a tokenizer that splits otherwise than those known here is refused, since tokens
that differ from those of the training damage a model in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fxfuse.errors import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter

Fields: TypeAlias = dict[str, object]
"""Metadata of a GGUF file by key: bools, whole numbers, floats, strings, and lists of them."""

_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
"""llama.cpp's types of tokens."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_SPLITS = {
    (_GPT2,): "gpt-2",
    ("digits", _GPT2): "smollm",
    (_CASES + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_CASES + r"\p{N}" + _REST,): "qwen2",
}
"""What splits a text before BPE, one after the other, and llama.cpp's name for it."""


def fields_of(tokenizer: object, base: Path | None, rows: int) -> Fields:
    """The vocabulary's metadata.

    Args:
        tokenizer: a Hugging Face tokenizer, or None.
        base: a GGUF file whose vocabulary to take instead, or None.
        rows: how many rows the embedding has; those beyond the vocabulary become unused tokens.

    Returns:
        What llama.cpp needs to read and write text; if there is neither, that there are token ids alone.

    Raises:
        ExportError: llama.cpp would read text otherwise than the tokenizer does, or there are more tokens than rows.
    """
    if base is not None:
        return _copied(base, rows)
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"a {type(tokenizer).__name__} has no backend_tokenizer: give a fast one of transformers")
    described = json.loads(backend.to_str())
    fields = _bpe(described, rows)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := getattr(tokenizer, f"{ours}_token_id", None)) is not None:
            fields[f"tokenizer.ggml.{theirs}_token_id"] = int(token)
    bos: object = getattr(tokenizer, "bos_token_id", None)
    begins = tokenizer("a")["input_ids"][:1] == [bos]  # type: ignore[operator]  # a tokenizer is called
    fields["tokenizer.ggml.add_bos_token"] = bos is not None and bool(begins)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        fields["tokenizer.chat_template"] = template
    return fields


def _bpe(described: Mapping[str, Any], rows: int) -> Fields:
    """Tokens, their types and merges of what ``tokenizer.json`` describes."""
    model = described["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ExportError(
            f"the tokenizer is {model.get('type')}, and this format writes byte-level BPE: convert a model that has "
            "this tokenizer with llama.cpp's own script, and give that file as the option vocabulary"
        )
    if described.get("normalizer") not in (None, {"type": "NFC"}):
        raise ExportError(f"the tokenizer changes text before it reads it: {described['normalizer'].get('type')}")
    splits = tuple(_splits(described.get("pre_tokenizer")))
    if splits not in _SPLITS:
        raise ExportError(
            f"the tokenizer splits text by {list(splits)}, which is none of llama.cpp's ways known here "
            f"({', '.join(_SPLITS.values())}): give a GGUF file with this tokenizer as the option vocabulary"
        )
    tokens = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, _NORMAL)
    for added in described.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER
    if tokens and max(tokens) >= rows:
        raise ExportError(f"the tokenizer has a token {max(tokens)}, and the model {rows} rows of embeddings")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _SPLITS[splits],
        "tokenizer.ggml.tokens": [tokens.get(number, f"[PAD{number}]") for number in range(rows)],
        "tokenizer.ggml.token_type": [kinds.get(number, _UNUSED) for number in range(rows)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _splits(described: Mapping[str, Any] | None) -> list[str]:
    """What splits text before BPE, in order: regular expressions, or "digits" for digits that stand alone."""
    if described is None:
        return []
    kind = described["type"]
    if kind == "Sequence":
        return [split for part in described["pretokenizers"] for split in _splits(part)]
    if kind == "ByteLevel" and not described.get("add_prefix_space"):
        return [_GPT2] if described.get("use_regex", True) else []
    if kind == "Digits" and described.get("individual_digits"):
        return ["digits"]
    if kind == "Split" and described.get("behavior") == "Isolated" and not described.get("invert"):
        return [str(described["pattern"].get("Regex"))]
    return [json.dumps(described)]


def _copied(base: Path, rows: int) -> Fields:
    """The vocabulary of another GGUF file."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(base)
    except (OSError, ValueError) as error:
        raise ExportError(f"{str(base)!r}, the option vocabulary, cannot be read as a GGUF file: {error}") from error
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    tokens = fields.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list) or len(tokens) != rows:
        raise ExportError(f"{str(base)!r} has {len(tokens)} tokens, and the model {rows} rows of embeddings")
    return fields


def write_fields(writer: GGUFWriter, fields: Fields) -> None:
    """Add ``fields`` to what a writer will write."""
    for key, value in fields.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
            case _:
                raise AssertionError(f"{key} is {value!r}")
