"""How far a student's next-token distributions are from its teacher's: chunk by chunk of tokens, with its gradient.

The logits of a large vocabulary are the largest tensors of a training step. So log-probabilities exist for a chunk of
tokens at a time, and the gradient, which is known in closed form, is written where the teacher's logits were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from fxfuse.errors import HealError
from fxfuse.measure.evaluation import IGNORED

Target: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Of token numbers ``[n]`` and the student's log-probabilities ``[n, vocabulary]``: the teacher's log-probabilities."""

_CHUNK = 2**22
"""Logits that are worked on at a time: 16 MiB in float32, whatever the vocabulary."""


def targets(batch: Mapping[str, object]) -> Tensor:
    """What each position is to predict, int64 ``[batch, length]``; ``IGNORED`` where nothing counts, as at the end.

    As for :func:`fxfuse.evaluate`: a token is left out if ``attention_mask`` hides it or the position that predicts it,
    or if ``labels`` (not shifted) has -100 for it.

    Raises:
        HealError: ids, labels or mask of which it cannot be told which tokens count.
    """
    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise HealError("input_ids must be a tensor [batch, length]")
    wanted = ids if labels is None else labels
    if not isinstance(wanted, Tensor) or wanted.shape != ids.shape:
        raise HealError(f"labels must be a tensor {[*ids.shape]}, as input_ids are")
    made = torch.full_like(wanted, IGNORED, dtype=torch.int64)
    made[:, :-1] = wanted[:, 1:]
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        seen = mask.bool().to(made.device)
        made[:, :-1].masked_fill_(~(seen[:, 1:] & seen[:, :-1]), IGNORED)
    elif mask is not None and labels is None:
        raise HealError(
            f"attention_mask is not {[*ids.shape]}, so it cannot be told which tokens count; "
            f"give labels {[*ids.shape]} with {IGNORED} for those that do not"
        )
    return made


def live(logits: Tensor) -> Target:
    """The target of a teacher whose logits ``[tokens, vocabulary]`` are at hand."""
    return lambda part, log_q: F.log_softmax(logits[part].to(log_q), -1)


def completed(log_probabilities: Tensor, tokens: Tensor) -> Target:
    """The target of a teacher of whom the likeliest tokens are known: all others together are one class.

    KL over these classes is KL over the vocabulary if the teacher's rest is shared out as the student shares out its
    own; and so is the gradient.

    Args:
        log_probabilities: of the likeliest tokens, ``[tokens, k]``.
        tokens: which these are, integers ``[tokens, k]``.
    """

    def target(part: Tensor, log_q: Tensor) -> Tensor:
        log_p, places = log_probabilities[part].to(log_q), tokens[part].long()
        rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(0)
        others = log_q.scatter(-1, places, -torch.inf)
        theirs = others.logsumexp(-1, keepdim=True)  # of no token at all if k is the vocabulary
        shared = torch.where(theirs.isfinite(), others + rest.log() - theirs, others)
        return shared.scatter(-1, places, log_p)

    return target


def divergence(
    logits: Tensor, target: Target, wanted: Tensor, lm: float = 0.0, room: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sum over tokens of ``KL(teacher || student) + lm * -log q(wanted)``, and that of the KL alone.

    Args:
        logits: the student's, ``[tokens, vocabulary]``; the first sum has gradients for them.
        target: the teacher's log-probabilities.
        wanted: the next tokens, int64 ``[tokens]``; ``IGNORED`` for those that do not count.
        lm: weight of the language model's own loss.
        room: of the shape and dtype of ``logits``, to be overwritten by their gradient: the teacher's logits.
    """
    total, kl = _Divergence.apply(logits, target, wanted, lm, room)  # type: ignore[no-untyped-call]
    return total, kl


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, target: Target, wanted: Tensor, lm: float, room: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        kind = torch.promote_types(logits.dtype, torch.float32)
        gradient = torch.empty_like(logits) if room is None else room
        gradient[wanted == IGNORED] = 0
        kl, nll = (torch.zeros((), dtype=kind, device=logits.device) for _ in range(2))
        counted = (wanted != IGNORED).nonzero().squeeze(-1)
        for part in torch.split(counted, max(1, _CHUNK // logits.shape[-1])):
            log_q = F.log_softmax(logits[part], -1, dtype=kind)
            log_p = target(part, log_q)
            p, q = log_p.exp(), log_q.exp()
            kl += torch.where(p > 0, p * (log_p - log_q), 0).sum()
            change = q - p
            if lm:
                token = wanted[part].unsqueeze(-1)
                nll -= log_q.gather(-1, token).sum()
                change += lm * q.scatter_add(-1, token, -torch.ones_like(token, dtype=kind))
            gradient[part] = change.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(kl)
        return kl + lm * nll, kl

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]  # torch types the context of no function
        return gradient * gradients[0], None, None, None, None
