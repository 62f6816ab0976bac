"""Weights written to safetensors files one by one: no more of them is in memory than the one that is being written.

The library writes a file from tensors that are all there at once. The format is simple enough to be streamed: eight
bytes with the length of a JSON header, the header with the place of each tensor, the tensors
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from fxfuse.errors import ExportError
from fxfuse.exporting.weights import Weight

SHARD = 4 * 2**30
"""Bytes of weights in a file at most, but for a weight that is larger by itself."""

INDEX = "model.safetensors.index.json"

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls dtypes."""

_ALIGNMENT = 8
"""The header is padded with spaces, so that tensors begin at multiples of this, as the library has it."""


def write_weights(
    folder: Path, weights: Mapping[str, Weight], shard: int = SHARD, done: Callable[[int], None] = lambda count: None
) -> None:
    """Write ``weights`` as ``model.safetensors``, or as several files and their index.

    Args:
        folder: where to; no such file is there yet.
        weights: by name, in the order in which they are written.
        shard: bytes in a file, at most.
        done: is told how many bytes more were written.

    Raises:
        OSError: the disk is full, say.
        ExportError: a dtype has no name in the format.
    """
    shards = _shards(weights, shard)
    if len(shards) == 1:
        _write(folder / "model.safetensors", shards[0], done)
        return
    place: dict[str, str] = {}
    for number, held in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / name, held, done)
        place |= dict.fromkeys(held, name)
    total = sum(weight.size for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(weights: Mapping[str, Weight], limit: int) -> list[dict[str, Weight]]:
    shards: list[dict[str, Weight]] = [{}]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.size > limit:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.size
    return shards


def _write(path: Path, weights: Mapping[str, Weight], done: Callable[[int], None]) -> None:
    with path.open("wb") as file:
        file.write(_header(weights))
        for weight in weights.values():
            _write_one(file, weight)
            done(weight.size)


def _header(weights: Mapping[str, Weight]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, weight in weights.items():
        if weight.dtype not in _NAMES:
            raise ExportError(f"{name!r} is {weight.dtype}, which safetensors files do not hold")
        where = [start, start + weight.size]
        entries[name] = {"dtype": _NAMES[weight.dtype], "shape": list(weight.shape), "data_offsets": where}
        start += weight.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_one(file: BinaryIO, weight: Weight) -> None:
    made = weight()
    if made.numel():
        file.write(made.flatten().view(torch.uint8).numpy().data)
