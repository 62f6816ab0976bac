"""Ridge regression of what is missing in a stream on what a linear map reads, from sums over tokens.

Minimise ``sum_t w_t |r_t - D u_t|^2 + strength * |D|^2`` over the change D of a map, where u are its inputs, r is the
residual that the stream should gain, and w weighs the tokens. ``D = B (A + strength I)^-1`` with ``A = sum w u u'`` and
``B = sum w r u'``; the error of any D on other tokens follows from their sums alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxfuse.errors import NotFiniteError

STRENGTHS = (1e-10, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Strengths that are tried, relative to the mean of A's diagonal."""

_ROWS = 4096
"""Tokens that are worked on at a time."""


@dataclass
class Sums:
    """Sums over tokens, float64: all that a fit, or the error of one, needs to know of them.

    Attributes:
        gram: ``sum w u u'``, ``[units, units]``.
        cross: ``sum w r u'``, ``[d, units]``.
        square: ``sum w |r|^2``.
        tokens: how many there were.
    """

    gram: Tensor
    cross: Tensor
    square: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, units: int, width: int, device: torch.device) -> Sums:
        """Of no tokens."""
        gram, cross = (torch.zeros(rows, units, dtype=torch.float64, device=device) for rows in (units, width))
        return cls(gram, cross)

    def add(self, inputs: Tensor, residual: Tensor, weight: Tensor) -> None:
        """Add tokens: ``[tokens, units]``, ``[tokens, d]``, ``[tokens]``.

        Products of a few thousand tokens are made in float32, or in float64 if the values are, and summed in float64.
        """
        for u, r, w in zip(*(torch.split(each, _ROWS) for each in (inputs, residual, weight)), strict=True):
            kind = torch.promote_types(torch.promote_types(u.dtype, r.dtype), torch.float32)
            root = w.to(kind).sqrt()[:, None]
            u, r = u.to(kind) * root, r.to(kind) * root
            self.gram += u.T @ u
            self.cross += r.T @ u
            self.square += float(r.double().square().sum())
            self.tokens += len(u)

    def error(self, change: Tensor | None) -> float:
        """Mean over tokens of ``w |r - change @ u|^2``; None changes nothing."""
        total = self.square
        if change is not None:
            total += float(((change @ self.gram) * change).sum() - 2 * (change * self.cross).sum())
        return max(total, 0.0) / self.tokens


def shares(parts: Sequence[Sums]) -> Sums:
    """Sums whose error is the mean over ``parts`` of what a change leaves of the error of each."""
    mean = [1 / (len(parts) * part.square) for part in parts]
    gram, cross = torch.zeros_like(parts[0].gram), torch.zeros_like(parts[0].cross)
    for part, factor in zip(parts, mean, strict=True):
        gram.add_(part.gram, alpha=factor)
        cross.add_(part.cross, alpha=factor)
    return Sums(gram, cross, 1.0, 1)


def solve(sums: Sums, strength: float) -> Tensor | None:
    """The change ``[d, units]``, float64, for a strength relative to the mean of the Gram matrix' diagonal.

    None if that strength is too small for the rounding errors of the sums.

    Raises:
        NotFiniteError: the sums hold NaN or infinity.
    """
    if not bool(torch.isfinite(sums.gram).all() and torch.isfinite(sums.cross).all()):
        raise NotFiniteError("NaN or infinity among what is fitted. Are the weights whole? Try float32")
    ridge = sums.gram.clone()
    ridge.diagonal().add_(strength * sums.gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(ridge)
    return None if bool(failed) else torch.cholesky_solve(sums.cross.T, factor).T


def best_strength(fitted: Sums, held: Sequence[Sums]) -> tuple[float, Tensor] | None:
    """The strength, and its change, that leaves least of the errors on text held out; None if none lessens them.

    What is left falls with the strength and then rises, so it is sought from the middle of the strengths, towards
    either side, and not at all of them.
    """
    if not all(sums.square > 0 for sums in held):
        return None
    judge, left = shares(held), dict[int, float]()
    least = 1 - 1e-4
    best: tuple[float, Tensor] | None = None

    def at(index: int) -> float:
        nonlocal least, best
        if index not in left:
            strength = STRENGTHS[index] if 0 <= index < len(STRENGTHS) else None
            change = None if strength is None else solve(fitted, strength)
            left[index] = math.inf if change is None else judge.error(change)
            if strength is not None and change is not None and left[index] < least:
                least, best = left[index], (strength, change)
        return left[index]

    index = len(STRENGTHS) // 2
    while (better := min((index, index - 1, index + 1), key=at)) != index:
        index = better
    return best
