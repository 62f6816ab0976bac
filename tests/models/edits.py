"""Edits in place: what hooks, ablations and careless code do to a value beside the dataflow."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Edit = Literal[
    "units", "token", "chunk", "transposed mask", "add_", "*=",
    "index_fill_", "narrow", "mask", "copy_", "by index", "flat",
]  # fmt: skip
Place = Literal["input", "gate", "up", "hidden", "output", "hook"]


def edited(edit: Edit | None, x: Tensor) -> Tensor:
    """``x`` ([..., n]) after it, or a view of it, was edited in place; of "by index", a new value written by index."""
    match edit:
        case "units":
            x[..., : (x.shape[-1] + 1) // 2] = 0
        case "token":
            x[..., 0, :] = 0.5
        case "chunk":
            x.chunk(2, -1)[-1].zero_()
        case "transposed mask":
            turned = x.transpose(-1, -2)
            turned.masked_fill_(turned > 0.3, -0.1)
        case "add_":
            x.add_(0.25)
        case "*=":
            x *= 0.5
        case "index_fill_":
            x.index_fill_(-1, torch.zeros(1, dtype=torch.int64), 0.3)
        case "narrow":
            x.narrow(-1, 0, 1).fill_(0.2)
        case "mask":
            x[x > 0.4] = 0.4
        case "copy_":
            x[..., :1].copy_(x[..., -1:] * 2)
        case "by index":
            made = torch.zeros_like(x)
            made[..., ::2] = x[..., ::2]
            return made
        case "flat":
            x.flatten(0, -2)[:, -1].neg_()
    return x


class EditingHook:
    """A forward hook that edits what a module returns; as ablations are written."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return edited(self.edit, output)
