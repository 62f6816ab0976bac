"""Quantized weights in blocks: ``scale * (q - zero_point)``, a scale and a zero point for each block of a matrix.

Two such matrices over one input can be one, with more rows, and two whose products are added can be one with more
columns, if no block grows: the numbers of both stay what they are, to the bit. Known are torchao's classes of that
form. Nothing of torchao is imported: its tensors tell themselves what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from fxfuse._torch.fake import is_traceable_wrapper_subclass, with_inner
from fxfuse._torch.sources import example
from fxfuse.graph.values import value

KNOWN = frozenset({"Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"})
"""Classes of torchao that keep their values unpacked, ``[out, in]``, and a scale for each block of ``block_size``."""

_PER_BLOCK = frozenset({"scale", "zero_point"})
_INNER = _PER_BLOCK | {"qdata"}
_DYNAMIC = ("act_quant_kwargs", "activation_quantization")


@dataclass(frozen=True)
class Blocks:
    """What two quantized matrices must have in common to be joined.

    Attributes:
        name: of their class.
        rows, columns: the size of a block.
        inner: what they are made of: names and dtypes.
        settings: all else that the class keeps, as text.
        dynamic: inputs are quantized too, with a scale for each token, taken over all of its features.
    """

    name: str
    rows: int
    columns: int
    inner: tuple[tuple[str, torch.dtype], ...]
    settings: str
    dynamic: bool


def blocks_of(tensor: Tensor) -> Blocks | str:
    """How ``tensor``, of a class of its own, is quantized; or why it is none of those that can be joined."""
    name = type(tensor).__name__
    plain = f"its weights are of the tensor class {name}, and only plain tensors can be packed into one"
    if name not in KNOWN or type(tensor).__module__.split(".")[0] != "torchao" or tensor.dim() != 2:
        return plain
    names, settings = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # those of KNOWN have it
    sizes = settings.get("block_size") if isinstance(settings, Mapping) else None
    if not isinstance(sizes, Sequence) or len(sizes) != 2 or not {"qdata", "scale"} <= {*names}:
        return plain
    if foreign := sorted({*names} - _INNER):
        return f"its weights are quantized for inputs that are scaled first ({name}.{foreign[0]}): each has its own"
    if tensor.requires_grad:
        return f"its quantized weights ({name}) are trained"
    rest = {key: repr(setting) for key, setting in settings.items() if key != "block_size"}
    return Blocks(
        name=name,
        rows=int(sizes[0]),
        columns=int(sizes[1]),
        inner=tuple((each, getattr(tensor, each).dtype) for each in names),
        settings=repr(sorted(rest.items())),
        dynamic=any(settings.get(key) is not None for key in _DYNAMIC),
    )


def blocks_at(node: fx.Node) -> Blocks | str:
    """The same of an input of a graph; of anything else, an empty string."""
    held = next((each for each in (value(node), example(node)) if is_quantized(each)), None)
    return "" if held is None else blocks_of(held)


def is_quantized(tensor: object) -> bool:
    """Whether ``tensor`` is a tensor made of others; one that is spread over processes is not."""
    return isinstance(tensor, Tensor) and is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)


def dequantized(tensor: Tensor) -> Tensor:
    """The numbers that a quantized matrix stands for; any other tensor as it is."""
    return tensor.dequantize() if is_quantized(tensor) and isinstance(blocks_of(tensor), Blocks) else tensor


def inner(tensor: Tensor) -> tuple[Tensor, ...]:
    """The plain tensors that a quantized ``tensor`` is made of; any other one by itself."""
    if not is_quantized(tensor):
        return (tensor,)
    return tuple(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])  # type: ignore[attr-defined]  # see above


def join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Matrices as one, more rows (``dim`` 0) or more columns; quantized ones are joined as they are, in new memory."""
    first = parts[0]
    if not is_quantized(first):
        return torch.cat(list(parts), dim)
    return _each(first, lambda name: torch.cat([getattr(part, name) for part in parts], dim), _joined(parts, dim))


def narrow(whole: Tensor, dim: int, start: int, length: int) -> Tensor:
    """Some rows or columns of a quantized matrix, whole blocks of it; a view of its memory."""
    size = whole.shape[dim]

    def cut(name: str) -> Tensor:
        held: Tensor = getattr(whole, name)
        per = size // held.shape[dim]  # a block's share of the dimension
        return held.narrow(dim, start // per, length // per)

    return _each(whole, cut, [length if each == dim else size for each, size in enumerate(whole.shape)])


def like(tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``make`` gives for ``tensor``; of a quantized one, a like one of what it gives for its parts."""
    if not is_quantized(tensor):
        return make(tensor)
    return _each(tensor, lambda name: make(getattr(tensor, name)), tensor.shape)


def _joined(parts: Sequence[Tensor], dim: int) -> list[int]:
    first = parts[0].shape
    return [sum(part.shape[dim] for part in parts) if each == dim else first[each] for each in range(len(first))]


def _each(like: Tensor, make: Callable[[str], Tensor], sizes: Sequence[int]) -> Tensor:
    """A tensor of the class and the settings of ``like``, made of other ones."""
    names, settings = like.__tensor_flatten__()  # type: ignore[attr-defined]  # those that are quantized have it
    return with_inner(like, {name: make(name) for name in names}, settings, sizes)
