"""The RMS norm of an output, as Gemma 2 and OLMo 2 have it: a branch adds ``gain * y / rms(y)``, where ``y = W h + b``.

Such a branch writes to the stream by the map ``gain * W``, but for the length of y, which the norm takes away. At the
lengths that y has now its change is linear, and ridge regression finds it; then W takes the direction that each row of
the changed map has, and the gain its length. So the rows of W, and with them the lengths of y, stay about what they
were, and a second fit at the lengths that they really have mends what is left.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxfuse.ffn.affine import normed
from fxfuse.ffn.rms import rms
from fxfuse.graph.ops import op
from fxfuse.graph.peel import Change, peel
from fxfuse.graph.values import last_dim


@dataclass(frozen=True)
class OutputNorm:
    """``(offset + gain) * y / sqrt(mean(y^2) + eps)`` over the last dimension.

    Attributes:
        gain: placeholder of a parameter ``[d]``.
        offset: what the model adds to it: 1 in Gemma, else 0.
        eps: of the norm.
    """

    gain: fx.Node
    offset: float
    eps: float

    def lengths(self, output: Tensor) -> Tensor:
        """What the norm divides ``y`` by: ``[..., 1]``, float32 or wider."""
        y = output.to(torch.promote_types(output.dtype, torch.float32))
        return (y.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def changed(self, rows: Tensor, gain: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """The map's rows ``[d, columns]`` and the gain ``[d]`` after a change of ``(offset + gain) * rows``.

        A row of zeros, and one that its change cancels, have no direction: they stay as they are.
        """
        whole = gain.double() + self.offset
        wanted = whole[:, None] * rows.double() + change.double()
        old, new = rows.double().norm(dim=1), wanted.norm(dim=1)
        sign = torch.where(whole < 0, -1.0, 1.0)
        known = (old > 0) & (new > 0)
        ratio = torch.where(known, sign * old / new, 1.0)
        made = torch.where(known[:, None], ratio[:, None] * wanted, rows.double())
        return made, torch.where(known, 1 / ratio, whole) - self.offset


def output_norm(
    node: fx.Node, weights: Mapping[fx.Node, str], constant: Container[fx.Node]
) -> tuple[OutputNorm, fx.Node, float] | None:
    """The norm that ``node`` is the output of, what it norms, and the number that multiplies its output; or None.

    Args:
        node: what a branch adds, casts and scales taken off.
        weights: the names of parameters, by placeholder.
        constant: the nodes that depend on weights alone.
    """
    width = last_dim(node)
    affine = normed(node, width, constant) if isinstance(width, int) else None
    root = rms(affine) if affine is not None else None
    if affine is None or root is None or affine.shifts or affine.factor.divisors or len(affine.factor.gains) != 1:
        return None
    gain = _parameter(affine.factor.gains[0], weights)
    return None if gain is None else (OutputNorm(*gain, root[1]), root[0], affine.factor.number)


def _parameter(node: fx.Node, weights: Mapping[fx.Node, str]) -> tuple[fx.Node, float] | None:
    """``(w, c)`` of a gain that is ``w`` or ``c + w``."""
    node = peel(node, Change.WIDEN | Change.ROUND)
    call = op(node)
    if call is not None and call.name == "add" and call.args.get("alpha", 1) == 1:
        pair = call.args.get("input"), call.args.get("other")
        for one, other in (pair, pair[::-1]):
            if isinstance(one, fx.Node) and isinstance(other, int | float):
                inner = peel(one, Change.WIDEN | Change.ROUND)
                return (inner, float(other)) if inner in weights else None
    return (node, 0.0) if node in weights else None
