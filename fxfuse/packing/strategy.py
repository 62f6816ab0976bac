"""Strategies: how packed values are kept, one class for each way, and one table that says which serves.

A strategy joins parts, finds them again in what it joined, writes and compares them, and takes gradients apart.
:class:`Copied` is right for plain tensors; the others say where they differ. A new kind of packed tensor is one more
class, and one more row in `BY_KIND`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fxfuse.errors import OptionError
from fxfuse.graph.blocks import inner, is_quantized, join, narrow
from fxfuse.packing.fingerprint import bits

Weights: TypeAlias = Literal["copy", "share"]


class Copied:
    """Packed values in memory of their own, beside the weights: it costs their size once more."""

    option = "copy"
    """What the option ``weights`` calls it."""

    folds = True
    """Whether packed values may be other than the weights: times the gain of a norm, say."""

    moves = False
    """Whether the packed tensor needs other memory once a member has left it."""

    def takes(self, made: Tensor) -> bool:
        """Whether it can keep a part like ``made``."""
        return True

    def join(self, made: Sequence[Tensor], dim: int) -> Tensor:
        """The parts in one tensor along ``dim``, in memory of its own."""
        return torch.cat(list(made), dim) if len(made) > 1 else made[0].clone()

    def gather(self, made: list[Tensor], owners: Sequence[Tensor | None], dim: int) -> Tensor:
        """``made``, joined; ``owners`` are the weights that are parts as they stand, and None for each other part.

        Takes parts out of ``made`` that are not needed any more.
        """
        return self.join(made, dim)

    def regions(self, packed: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
        """The parts as they lie in ``packed``; a write to one is a write to it."""
        return (packed,) if len(sizes) == 1 else tuple(torch.split(packed, list(sizes), dim))

    def write(self, region: Tensor, made: Tensor) -> None:
        """Let ``region`` hold the values of ``made``."""
        region.copy_(made)

    def same(self, region: Tensor, made: Tensor) -> bool:
        """Whether ``region`` holds ``made``, to the bit."""
        return torch.equal(bits(made), bits(region))

    def shares(self, member: Tensor, region: Tensor) -> bool:
        """Whether ``member`` is ``region``, so that neither can be stale."""
        return False

    def adopt(self, member: Tensor, region: Tensor) -> None:
        """Take over the memory of ``member``, whose values ``region`` holds."""

    def split(self, gradient: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
        """The gradient of the packed tensor as those of its parts."""
        return tuple(torch.split(gradient, list(sizes), dim))


class Shared(Copied):
    """The packed tensor owns the memory, and the weights become views of it: it costs nothing."""

    option = "share"
    folds = False
    moves = True

    def gather(self, made: list[Tensor], owners: Sequence[Tensor | None], dim: int) -> Tensor:
        for owner in owners:
            self._check(owner)
        if len(made) == 1:
            return super().gather(made, owners, dim)
        sizes = [part.shape[dim] for part in made]
        joined = torch.cat([part.to("meta") for part in made], dim)
        packed = torch.empty(joined.shape, dtype=joined.dtype, device=made[0].device)
        for owner, region in zip(owners, self.regions(packed, sizes, dim), strict=True):
            region.copy_(made.pop(0))
            if owner is not None:
                self.adopt(owner, region)  # one after the other: its old memory makes room for the next
        return packed

    def shares(self, member: Tensor, region: Tensor) -> bool:
        return member.data_ptr() == region.data_ptr()

    def adopt(self, member: Tensor, region: Tensor) -> None:
        self._check(member)
        member.data = region

    @staticmethod
    def _check(member: Tensor | None) -> None:
        if member is not None and member.is_inference():
            raise OptionError(
                "weights='share' cannot take the memory of weights that were made in inference_mode: "
                "load the model outside of it, or use weights='copy'"
            )


class Opaque(Copied):
    """A copy in oneDNN's own layout, of one part: nobody can look into it but through a dense copy."""

    def takes(self, made: Tensor) -> bool:
        return made.is_mkldnn

    def join(self, made: Sequence[Tensor], dim: int) -> Tensor:
        (alone,) = made
        return alone

    def same(self, region: Tensor, made: Tensor) -> bool:
        return super().same(region.to_dense(), made.to_dense())


class Blockwise(Copied):
    """A copy of weights that are quantized in blocks, which stay what they are (:mod:`fxfuse.graph.blocks`)."""

    def takes(self, made: Tensor) -> bool:
        return is_quantized(made)

    def join(self, made: Sequence[Tensor], dim: int) -> Tensor:
        return join(made, dim)

    def regions(self, packed: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        return tuple(narrow(packed, dim, start, size) for start, size in zip(starts, sizes, strict=True))

    def write(self, region: Tensor, made: Tensor) -> None:
        for own, new in zip(inner(region), inner(made), strict=True):
            own.copy_(new)

    def same(self, region: Tensor, made: Tensor) -> bool:
        return all(super(Blockwise, self).same(*pair) for pair in zip(inner(region), inner(made), strict=True))


BY_KIND: list[Copied] = [Opaque(), Blockwise()]
"""The strategies of tensors that no option concerns; the first that takes a part serves."""

COPIED, SHARED = Copied(), Shared()

BY_OPTION: dict[Weights, Copied] = {"copy": COPIED, "share": SHARED}
"""The strategies of all other tensors, by the option ``weights``."""


def strategy_of(made: Sequence[Tensor], weights: Weights) -> Copied:
    """The strategy that keeps these parts."""
    return next(strategy for strategy in (*BY_KIND, BY_OPTION[weights]) if strategy.takes(made[0]))
