"""Pack: the weights of n FFNs that read one point of the stream, as those of one wide FFN.

Gains are folded into the rows they multiply (float32, rounded once), so that all FFNs read the same un-normalised
tokens, and hidden units are padded with zeros to a multiple of `ALIGNMENT`: sizes that Triton does not know to be
divisible by 16 lose their asynchronous copies. A padded unit contributes ``act(0) * 0``, that is, nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.errors import KernelError

ALIGNMENT = 16
"""Hidden units are padded to a multiple of this."""


def pack_gate_up(
    gates: Sequence[Tensor],
    ups: Sequence[Tensor] | None = None,
    gains: Sequence[Tensor] | None = None,
    alignment: int = ALIGNMENT,
) -> Tensor:
    """Gate and up projections as one tensor ``[2, F, d]``, or ``[1, F, d]`` for plain MLPs; F is the padded total.

    Args:
        gates: one ``[f, d]`` for each FFN; widths may differ.
        ups: likewise, of the same widths; None for plain MLPs, whose only projection is in ``gates``.
        gains: one ``[d]`` for each FFN, folded in; None if the norm has none or the op gets it.
        alignment: what F is padded to a multiple of.

    Raises:
        KernelError: the shapes do not fit each other.
    """
    parts = [gates] if ups is None else [gates, ups]
    _check_width(gates, 1)
    if any([weight.shape for weight in part] != [weight.shape for weight in gates] for part in parts):
        raise KernelError("gate and up of an FFN must have the same shape")
    if gains is not None:
        if [gain.shape for gain in gains] != [weight.shape[1:] for weight in gates]:
            raise KernelError("pack_gate_up takes one gain for each FFN, of the size of its input")
        parts = [[_fold(weight, gain) for weight, gain in zip(part, gains, strict=True)] for part in parts]
    stacked = torch.stack([torch.cat(list(part)) for part in parts])
    return F.pad(stacked, (0, 0, 0, _missing(stacked.shape[1], alignment)))


def pack_down(downs: Sequence[Tensor], alignment: int = ALIGNMENT) -> Tensor:
    """Down projections, one ``[d, f]`` for each FFN, as one tensor ``[d, F]``.

    Raises:
        KernelError: they do not write to one stream.
    """
    _check_width(downs, 0)
    wide = torch.cat(list(downs), 1)
    return F.pad(wide, (0, _missing(wide.shape[1], alignment)))


def pack_bias(
    gates: Sequence[Tensor | None],
    ups: Sequence[Tensor | None] | None,
    widths: Sequence[int],
    alignment: int = ALIGNMENT,
) -> Tensor | None:
    """Biases of gate and up as ``[2, F]`` or ``[1, F]``, zeros for the FFNs that have none; None if nobody has one.

    Args:
        gates: one ``[f]`` or None for each FFN.
        ups: likewise; None for plain MLPs.
        widths: the FFNs' hidden units, f.
        alignment: as for `pack_gate_up`.

    Raises:
        KernelError: a bias does not have its FFN's width.
    """
    parts = [gates] if ups is None else [gates, ups]
    some = next((bias for part in parts for bias in part if bias is not None), None)
    if some is None:
        return None
    for part in parts:
        if [width if bias is None else bias.numel() for bias, width in zip(part, widths, strict=True)] != list(widths):
            raise KernelError(f"pack_bias takes biases of the FFNs' widths {list(widths)}")
    rows = [
        torch.cat([some.new_zeros(width) if bias is None else bias for bias, width in zip(part, widths, strict=True)])
        for part in parts
    ]
    stacked = torch.stack(rows)
    return F.pad(stacked, (0, _missing(stacked.shape[1], alignment)))


def _fold(weight: Tensor, gain: Tensor) -> Tensor:
    precise = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(precise) * gain.to(precise)).to(weight.dtype)


def _missing(width: int, alignment: int) -> int:
    return -width % alignment


def _check_width(weights: Sequence[Tensor], dimension: int) -> None:
    """The FFNs of a wide one read and write one stream, so their weights have one size along it."""
    shapes = [list(weight.shape) for weight in weights]
    if len({shape[dimension] for shape in shapes if len(shape) == 2}) != 1 or any(len(shape) != 2 for shape in shapes):
        raise KernelError(f"a wide FFN needs at least one FFN, and all of one model width; the weights are {shapes}")
