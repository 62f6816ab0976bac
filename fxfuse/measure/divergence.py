"""How far apart two vectors, or two next-token distributions, are: token by token, of the tokens that count."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fxfuse.measure.instrument import Changed, Instrumented

_CHUNK = 256
"""Tokens whose distributions are compared at a time: a vocabulary is large."""


class Divergence:
    """How far changed outputs of a graph are from those of the call that was measured.

    Attributes:
        known: the log-probabilities of that call, float32 ``[tokens, vocabulary]``; None if the graph has no logits.
    """

    def __init__(self, graph: Instrumented, logits: Tensor | None, counted: Tensor | None) -> None:
        self._position = next((p for p, made in enumerate(graph.output) if made is logits), None)
        self._counted = counted
        self.known: Tensor | None = None
        if logits is not None and self._position is not None:
            self.known = F.log_softmax(rows(logits, counted).float(), -1)

    def of(self, changed: Changed) -> Tensor:
        """Nats, float32 ``[tokens]``; nothing at all if the model has no logits."""
        if self.known is None or self._position is None:
            return torch.empty(0)
        if self._position not in changed.outputs:
            return torch.zeros(len(self.known))  # the change does not reach them
        others = torch.split(rows(changed.outputs[self._position], self._counted), _CHUNK)
        return torch.cat([_kl(p, other) for p, other in zip(torch.split(self.known, _CHUNK), others, strict=True)])


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(others)) of ``[tokens, vocabulary]``, in nats: float32 ``[tokens]``."""
    pairs = zip(torch.split(logits, _CHUNK), torch.split(others, _CHUNK), strict=True)
    return torch.cat([_kl(F.log_softmax(one.float(), -1), other) for one, other in pairs])


def _kl(p: Tensor, other: Tensor) -> Tensor:
    q = F.log_softmax(other.float(), -1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def cosine_distance(one: Tensor, other: Tensor) -> Tensor:
    """``1 - cos`` of vectors ``[..., d]``: ``[...]``, 0..2. As half a squared distance, which small angles survive."""
    return (F.normalize(one, dim=-1) - F.normalize(other, dim=-1)).square().sum(-1) / 2


def rows(values: Tensor, counted: Tensor | None) -> Tensor:
    """``[..., d]`` as ``[tokens, d]``, of the positions where ``counted`` is not 0."""
    flat = values.flatten(0, -2)
    if counted is None or counted.numel() != flat.shape[0]:
        return flat
    return flat[counted.flatten().bool()]
