"""How edits change what a model says next, each by itself, and so what two of them cost together.

To second order the KL of a change ``d`` of the logits is ``E_p[(d - E_p[d])^2] / 2``, a square. So of two edits whose
changes add up, the KL has a mixed term, ``2 r sqrt(KL_1 KL_2)``, where r is the cosine of their changes in that metric:
1 if they do the same harm, less than 0 if one mends what the other does. Block removal as constrained binary
optimisation (arXiv 2602.00161) takes the same terms from gradients; here they come from the edits themselves. Where no
model is at hand, the recorded distances stand for them (:func:`recorded_pairs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from fxfuse._common.progress import bar
from fxfuse.data.batches import Batch, Model, call, fresh, logits_of
from fxfuse.errors import NotFiniteError, PlanError, RecordError
from fxfuse.measure.divergence import divergence
from fxfuse.measure.recording import Recording
from fxfuse.plan import Plan, flat
from fxfuse.planning.solvers.problem import Pair

KEPT = 64
"""Of each token's distribution, the likeliest words whose changes are kept."""


@dataclass(frozen=True)
class Changes:
    """What edits do by themselves.

    Attributes:
        kl: of each, nats per token.
        vectors: float16 ``[edits, tokens * KEPT]``, in the same order: ``sqrt(p / tokens) (d - E_p[d])``, scaled to
            length 1.
    """

    kl: Mapping[Plan, float]
    vectors: Tensor

    def pairs(self) -> dict[Pair, float]:
        """What two edits cost together beyond the sum of both, nats per token, by their places."""
        likeness = (self.vectors.float() @ self.vectors.float().T).clamp(-1, 1).tolist()
        roots = [math.sqrt(max(kl, 0.0)) for kl in self.kl.values()]
        numbers = range(len(roots))
        return {(i, j): 2 * likeness[i][j] * roots[i] * roots[j] for i, j in combinations(numbers, 2)}

    @classmethod
    def empty(cls) -> Changes:
        return cls({}, torch.empty(0, 0, dtype=torch.float16))

    def having(self, edit: Plan, kl: float, vector: Tensor) -> Changes:
        """The same and one more."""
        row = F.normalize(vector.float(), dim=0).half()[None]
        vectors = torch.cat([self.vectors, row]) if len(self.kl) else row
        return Changes({**self.kl, edit: kl}, vectors)


def measure_changes(
    edits: Iterable[Plan],
    planned: Callable[[Plan], Model],
    original: Model,
    batches: Sequence[Batch],
    known: Changes,
    keep: Callable[[Changes], None],
    progress: bool = False,
) -> Changes:
    """The changes of ``edits`` beside those that are ``known``; what cannot be applied, or makes NaN, is left out.

    Args:
        edits: each as a plan.
        planned: the model as a plan has it.
        original: the model.
        batches: keyword arguments of calls; tokens that ``attention_mask`` hides do not count.
        known: of these edits, those that were measured before, on the same batches.
        keep: is called after each with all that is known then.
        progress: show on stderr how far it is.

    Raises:
        RecordError: the model returns no logits.
    """
    wanted = list(edits)
    references = [_rows(original, number, batch) for number, batch in enumerate(batches)]
    best = [_Likeliest.of(logits) for logits in references]
    made = known
    with bar("scoring edits", "edits", len(wanted), progress) as advance:
        for edit in wanted:
            if edit not in made.kl:
                try:
                    kl, vector = _change(planned(edit), references, best, batches)
                except (PlanError, NotFiniteError):
                    kl, vector = math.inf, torch.zeros(1)
                if kl < math.inf:
                    made = made.having(edit, kl, vector)
                    keep(made)
            advance(1)
    return made


@dataclass(frozen=True)
class _Likeliest:
    """The likeliest words of tokens: their numbers and probabilities, ``[tokens, KEPT]``."""

    words: Tensor
    shares: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> _Likeliest:
        shares, words = F.softmax(logits.float(), -1).topk(min(KEPT, logits.shape[-1]), -1)
        return cls(words, shares)

    def change(self, logits: Tensor, others: Tensor) -> Tensor:
        """``sqrt(p) (d - E_p[d])`` of the words kept: ``[tokens, KEPT]``."""
        apart = (others.gather(-1, self.words) - logits.gather(-1, self.words)).float()
        mean = (self.shares * apart).sum(-1, keepdim=True) / self.shares.sum(-1, keepdim=True)
        return self.shares.sqrt() * (apart - mean)


def _change(
    model: Model, references: Sequence[Tensor], best: Sequence[_Likeliest], batches: Sequence[Batch]
) -> tuple[float, Tensor]:
    """KL of a planned model, and its change."""
    total, vectors = 0.0, []
    for number, (batch, logits, likeliest) in enumerate(zip(batches, references, best, strict=True)):
        others = _rows(model, number, batch)
        if not bool(torch.isfinite(others).all()):
            raise NotFiniteError("the planned model computes NaN or infinity")
        total += float(divergence(logits, others).double().sum())
        vectors.append(likeliest.change(logits, others).flatten())
    return total / sum(len(logits) for logits in references), torch.cat(vectors)


def _rows(model: Model, number: int, batch: Batch) -> Tensor:
    """The logits of the positions that predict a token, as :func:`fxfuse.evaluate` counts them: ``[n, vocabulary]``."""
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits = logits_of(call(model, number, fresh(given)))
    if logits is None or logits.dim() != 3:
        raise RecordError(
            "the model returns no logits [batch, length, vocabulary], so nobody can tell what an edit costs"
        )
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != logits.shape[:-1]:
        return logits[:, :-1].flatten(0, 1)
    seen = mask.bool().to(logits.device)
    return logits[:, :-1][seen[:, 1:] & seen[:, :-1]]


def recorded_costs(recording: Recording, edits: Iterable[Plan]) -> dict[Plan, float]:
    """What edits cost by what was recorded alone, nats per token.

    A drop costs its recorded KL. In a group every FFN but the first computes something else: a contribution turned by
    the cosine distance M has changed by ``sqrt(2 M)`` of its length, and KL grows with the square, so it costs ``2 M``
    of what its drop would. Recorded groups cost what was recorded. A linear map, unhealed, costs what a drop does.
    """
    groups = {record.branches: record.kl for record in recording.groups if not math.isnan(record.kl)}

    def turned(group: tuple[str, ...]) -> float:
        places = [recording.index(name) for name in group]
        return sum(
            float(recording.kl[j]) * min(1.0, 2 * sum(float(recording.mean[i, j]) for i in places if i < j))
            for j in places
        )

    def cost(edit: Plan) -> float:
        gone = sum(float(recording.kl[recording.index(name)]) for name in (*edit.drop, *edit.linear))
        return gone + sum(groups.get(flat(group), turned(flat(group))) for group in edit.parallel)

    return {edit: cost(edit) for edit in edits}


def recorded_pairs(recording: Recording, costs: Mapping[Plan, float]) -> dict[Pair, float]:
    """What two edits cost together beyond the sum of both, guessed from the recorded distances of their branches.

    Branches that depend on each other are taken to do like harm: half of the largest distance of a branch of the one,
    if a branch of the other leaves, stands for the cosine of their changes.
    """
    places = [[recording.index(name) for name in edit.names] for edit in costs]
    kls = list(costs.values())
    distances = recording.mean.maximum(recording.mean.T)

    def term(i: int, j: int) -> float:
        near = float(distances[places[i]][:, places[j]].max()) / 2
        return 2 * near * math.sqrt(max(kls[i], 0.0) * max(kls[j], 0.0))

    return {(i, j): term(i, j) for i, j in combinations(range(len(kls)), 2)}
