"""Files of tensors that show their damage: safetensors with a header of ours, and a digest of both in it.

safetensors sees that a file was cut short, and not that a bit of it has flipped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_DIGEST = "sha256"


def seal(form: str, header: Mapping[str, object], tensors: Mapping[str, Tensor]) -> bytes:
    """A file of ``tensors`` and a ``header``; equal for equal ones.

    Args:
        form: which of our files it is, and the version of that: the only key of the file's metadata, because the order
            of several is not defined.
        header: what JSON can say.
        tensors: on any device.
    """
    own: dict[str, object] = json.loads(json.dumps(header))
    made = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return save(made, {form: json.dumps({**own, _DIGEST: _digest(own, made)}, sort_keys=True)})


def unseal(path: str | os.PathLike[str], form: str) -> tuple[dict[str, object], dict[str, Tensor]] | None:
    """The header and the tensors of what :func:`seal` made; None of any other safetensors file.

    Files without a digest are from before there was one, and are taken as they are.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none of safetensors, was cut short, or is not what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, TypeError, AttributeError) as error:  # a dtype that it has no name for
        raise ValueError(str(error)) from error
    if form not in metadata:
        return None
    try:
        header: object = json.loads(metadata[form])
    except RecursionError as error:
        raise ValueError("its header is no JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}, not an object")
    digest = header.pop(_DIGEST, None)
    if digest is not None and digest != _digest(header, tensors):
        raise ValueError("it is not what was written: the digest differs")
    return header, tensors


def _digest(header: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer, as typed in C
    return digest.hexdigest()
