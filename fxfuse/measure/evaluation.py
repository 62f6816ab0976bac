"""Evaluate: how well a model predicts the next token, and how far it is from the model that it stands for.

Perplexity, and against a reference KL(reference || model) (the score of Puzzle, arXiv 2411.19146) and top-1 agreement.
Tokens of one sequence are not independent, so what the intervals count is sequences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeAlias

import torch
from scipy.special import stdtrit
from torch import Tensor
from torch.nn import functional as F

from fxfuse._common.bounds import check_count
from fxfuse._common.progress import bar
from fxfuse.data.batches import Batch, Model, call, check_batch, eval_mode, fresh, logits_of
from fxfuse.errors import NotFiniteError, OptionError, RecordError
from fxfuse.measure.tasks import harness
from fxfuse.measure.tasks.scores import TaskScore, table

Interval: TypeAlias = tuple[float, float]

IGNORED = -100
"""The label of a token that does not count, as everywhere in torch."""

_CHUNK = 2**22
"""Logits that are worked on at a time: 16 MiB in float32, whatever the vocabulary."""


@dataclass(frozen=True)
class Metrics:
    """What :func:`evaluate` found; ``str()`` is a table.

    Attributes:
        tokens: how many predicted tokens every number averages over.
        sequences: how many sequences these belong to.
        perplexity: exp of the mean negative log-likelihood.
        kl: KL(reference || model), nats per token; None without a reference.
        agreement: share of the tokens for which both models find the same token likeliest; None without a reference.
        perplexity_interval, kl_interval, agreement_interval: for the mean over all text like this, at ``confidence``;
            (nan, nan) for fewer than two sequences.
        confidence: of the intervals.
        tasks: the model's scores, if tasks were asked for.
        reference_tasks: the reference's.
    """

    tokens: int
    sequences: int
    perplexity: float
    perplexity_interval: Interval
    kl: float | None = None
    kl_interval: Interval | None = None
    agreement: float | None = None
    agreement_interval: Interval | None = None
    confidence: float = 0.95
    tasks: tuple[TaskScore, ...] = ()
    reference_tasks: tuple[TaskScore, ...] = ()

    def __str__(self) -> str:
        rows = [
            ("perplexity", self.perplexity, self.perplexity_interval),
            ("KL to the reference, nats/token", self.kl, self.kl_interval),
            ("top-1 agreement", self.agreement, self.agreement_interval),
        ]
        lines = [f"{'':31}  {'mean':>9}  {f'{self.confidence:.3g} interval':>24}"]
        for name, mean, interval in rows:
            if mean is not None and interval is not None:
                lines.append(f"{name:31}  {mean:9.4g}  {f'{interval[0]:.4g} .. {interval[1]:.4g}':>24}")
        lines.append(f"{self.tokens:,} tokens of {self.sequences:,} sequences")
        if self.tasks:
            models = {"reference": self.reference_tasks} if self.reference_tasks else {}
            lines += ["", table({**models, "model": self.tasks}, self.confidence)]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The attributes as a JSON object; numbers that are not finite, which JSON cannot write, are null."""

        def finite(value: object) -> object:
            if isinstance(value, dict):
                return {key: finite(each) for key, each in value.items()}
            if isinstance(value, tuple):
                return [finite(each) for each in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return json.dumps({name: finite(value) for name, value in asdict(self).items()}, indent=2)


def evaluate(
    model: Model,
    batches: Iterable[Batch],
    reference: Model | None = None,
    *,
    max_tokens: int | None = None,
    progress: bool = False,
    confidence: float = 0.95,
    tasks: Sequence[str] = (),
    tokenizer: object = None,
    task_limit: int | None = None,
) -> Metrics:
    """Perplexity of ``model`` and, with a ``reference``, how far it is from that.

    Both run without gradients and in eval mode, and are left as they were. Probabilities are float32, or float64 if the
    logits are.

    Args:
        model: a module, compiled, applied or neither, or a compiled function. It returns logits ``[batch, length,
            vocabulary]``: as a tensor, as ``.logits``, or as the first such tensor of a tuple.
        batches: keyword arguments of the model's calls, such as ``{"input_ids": [batch, length]}``; a DataLoader
            serves. Each row is a sequence, and position t predicts the token at t + 1. A token is left out if
            ``attention_mask`` ``[batch, length]`` hides it or the position that predicts it, or if ``labels`` (not
            shifted, and not given to the model) has -100 for it.
        reference: the model that ``model`` stands for; it is called with the same batches; each call gets its own
            copy of what holds state, such as a KV cache.
        max_tokens: count no more predicted tokens than this.
        progress: show on stderr how far it is, as a bar or, without a terminal, in lines.
        confidence: of the intervals, between 0 and 1.
        tasks: also run these tasks, by lm_eval (the extra ``eval``), on the model and on the reference; "all" for those
            that ship with fxfuse. See :func:`fxfuse.measure.tasks.harness.score`, which this calls, and what it raises.
        tokenizer: for the tasks.
        task_limit: put no more documents than this of each task to a model.

    The means are ratios of two sums over sequences, of scores and of tokens. Their variance is that of the ratio
    estimator (delta method) with sequences as the independent units, their interval Student's with one degree of
    freedom less than there are sequences, cut off where no mean can be; that of the perplexity is exp of that of the
    mean negative log-likelihood. Fewer than two sequences say nothing of their variance: (nan, nan).

    Raises:
        RecordError: no token to count; a batch that is no mapping, has no ``input_ids`` or that the model cannot be
            called with; logits that are none, or of another vocabulary than the reference's.
        NotFiniteError: logits are NaN or infinite.
        OptionError: ``max_tokens`` or ``confidence`` out of range.
        FxfuseError: whatever the backend has to say about the plan of a compiled model.
    """
    check_count("max_tokens", max_tokens)
    if not 0 < confidence < 1:
        raise OptionError(f"confidence lies between 0 and 1 (0.95, say), not at {confidence}")
    models = [model] if reference is None else [model, reference]
    for each in models if tasks else []:
        harness.check(each, tokenizer, tasks, task_limit)
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    counted = 0
    with eval_mode(*models), bar("evaluating", "tokens", max_tokens, progress) as advance:
        for number, batch in enumerate(batches):
            targets = _targets(number, check_batch(number, batch), None if max_tokens is None else max_tokens - counted)
            if not bool((targets != IGNORED).any()):
                continue
            arguments = {name: value for name, value in batch.items() if name != "labels"}
            logits = [_logits(each, number, arguments, targets) for each in models]
            rows, tokens = _scores(number, logits, targets)
            sums.append(rows)
            counts.append(tokens)
            counted += int(tokens.sum())
            advance(int(tokens.sum()))
            if max_tokens is not None and counted >= max_tokens:
                break
    if not counted:
        raise RecordError(
            "no token was evaluated: there was no batch, or all tokens are masked, or every sequence has just one. "
            "Give at least one batch of sequences of two tokens"
        )
    found = _metrics(torch.cat(sums), torch.cat(counts), confidence)
    if not tasks:
        return found
    scores = [harness.score(each, tokenizer, tasks, limit=task_limit, progress=progress) for each in models]
    return replace(found, tasks=scores[0], reference_tasks=scores[1] if len(scores) > 1 else ())


def _targets(number: int, batch: Batch, limit: int | None) -> Tensor:
    """What each position but the last is to predict, int64 ``[batch, length - 1]``; ``IGNORED`` if nothing."""
    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise RecordError(f"batch {number}: input_ids must be integers [batch, length], not {_described(ids)}")
    wanted = ids if labels is None else labels
    if not isinstance(wanted, Tensor) or wanted.shape != ids.shape:
        raise RecordError(f"batch {number}: labels must be a tensor {[*ids.shape]}, not {_described(wanted)}")
    targets = wanted[:, 1:].to(torch.int64)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        seen = mask.to(ids.device).bool()
        targets = targets.masked_fill(~(seen[:, 1:] & seen[:, :-1]).to(targets.device), IGNORED)
    elif mask is not None and labels is None:
        raise RecordError(
            f"batch {number}: attention_mask is {_described(mask)}, from which it cannot be told which tokens count; "
            f"give labels {[*ids.shape]} with {IGNORED} for those that do not"
        )
    if limit is None:
        return targets
    rank = (targets != IGNORED).flatten().cumsum(0).view_as(targets)
    return targets.masked_fill(rank > limit, IGNORED)


def _logits(model: Model, number: int, arguments: Batch, targets: Tensor) -> Tensor:
    logits = logits_of(call(model, number, fresh(arguments)))
    if logits is None:
        raise RecordError(
            f"batch {number}: the model returned no logits: let it return a tensor [batch, length, vocabulary], or an "
            "object with .logits"
        )
    batch, length = targets.shape
    if logits.shape[:-1] != (batch, length + 1):
        raise RecordError(
            f"batch {number}: the model returned logits {[*logits.shape]} for input_ids {[batch, length + 1]}; each "
            "position needs its own"
        )
    return logits


def _scores(number: int, logits: list[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each sequence's tokens, float64 ``[sequences, 1 or 3]``, and how many these are; none of no tokens.

    The columns: negative log-likelihood under ``logits[0]``; with ``logits[1]``, the reference's, KL and agreement.
    """
    own, *others = logits
    vocabulary = own.shape[-1]
    for other in others:
        if other.shape[-1] != vocabulary:
            raise RecordError(
                f"the model has a vocabulary of {vocabulary} tokens, its reference one of {other.shape[-1]}: they "
                "cannot be compared"
            )
    unknown = (targets != IGNORED) & ((targets < 0) | (targets >= vocabulary))
    if bool(unknown.any()):
        raise RecordError(
            f"batch {number}: token {int(targets[unknown][0])} is not in a vocabulary of {vocabulary}; are these the "
            "model's logits, and the tokens those of its tokenizer?"
        )
    sequence, position = (targets != IGNORED).nonzero(as_tuple=True)
    sums = torch.zeros(len(targets), 1 + 2 * len(others), dtype=torch.float64)
    size = max(1, _CHUNK // vocabulary)
    for start in range(0, len(sequence), size):
        rows, columns = sequence[start : start + size], position[start : start + size]
        log_q, *log_ps = (_log_softmax(number, each[rows, columns]) for each in logits)
        scores = [-log_q.gather(-1, targets[rows, columns, None].to(log_q.device)).squeeze(-1)]
        for log_p in log_ps:
            log_p = log_p.to(log_q.device)
            scores.append((log_p.exp() * (log_p - log_q)).sum(-1))
            scores.append((log_p.argmax(-1) == log_q.argmax(-1)).to(log_q.dtype))
        sums.index_add_(0, rows.cpu(), torch.stack(scores, -1).double().cpu())
    counts = (targets != IGNORED).sum(1).cpu()
    return sums[counts > 0], counts[counts > 0]


def _log_softmax(number: int, rows: Tensor) -> Tensor:
    if not bool(torch.isfinite(rows).all()):
        raise NotFiniteError(
            f"batch {number}: the logits hold NaN or infinity. Are the weights whole? Does the model overflow in this "
            "dtype? Try float32"
        )
    return F.log_softmax(rows, -1, dtype=torch.promote_types(rows.dtype, torch.float32))


def _metrics(sums: Tensor, counts: Tensor, confidence: float) -> Metrics:
    nll, *others = (_ratio(column, counts, confidence) for column in sums.unbind(1))
    perplexity, *interval = nll.exp().tolist()
    found = Metrics(int(counts.sum()), len(counts), perplexity, (interval[0], interval[1]), confidence=confidence)
    if not others:
        return found
    kl, agreement = others[0].clamp_min(0).tolist(), others[1].clamp(0, 1).tolist()
    return replace(
        found,
        kl=kl[0],
        kl_interval=(kl[1], kl[2]),
        agreement=agreement[0],
        agreement_interval=(agreement[1], agreement[2]),
    )


def _ratio(sums: Tensor, counts: Tensor, confidence: float) -> Tensor:
    """Mean per token and the two ends of its interval, float64 ``[3]``, of sums over clusters of ``counts`` tokens."""
    n, tokens = len(sums), counts.sum()
    mean = sums.sum() / tokens
    if n < 2:
        return torch.stack([mean, mean * torch.nan, mean * torch.nan])
    variance = n / (n - 1) * (sums - mean * counts).square().sum() / tokens**2
    reach = float(stdtrit(n - 1, (1 + confidence) / 2)) * variance.sqrt()
    return torch.stack([mean, mean - reach, mean + reach])


def _described(value: object) -> str:
    return f"{value.dtype} {[*value.shape]}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
