"""Stages of a training, each with its own text and budget, and that text as Hugging Face's Trainer takes it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TypeAlias

from torch.utils.data import Dataset, IterableDataset

from fxfuse._common.bounds import check_bound, check_count
from fxfuse.data.batches import Batch, check_batch
from fxfuse.errors import HealError, OptionError
from fxfuse.healing.loss import targets
from fxfuse.measure.evaluation import IGNORED

_SAMPLE = 64
"""Batches from which it is estimated how many tokens one holds."""

FOREVER = 2**31 - 1
"""Steps of a training that ends by the clock."""

WEIGHT = "fxfuse_weight"
"""Key of a batch under which it carries how much a token of it counts."""

Dress: TypeAlias = Callable[[Batch], Batch]
"""Adds to a batch what is known of it, such as what the teacher says."""


@dataclass(frozen=True)
class Stage:
    """A part of a training: the paper (arXiv 2503.18908) has four, of sequences of 8k, 16k, 32k and 128k tokens.

    Without a budget, each batch is used once.

    Attributes:
        batches: keyword arguments of the model's calls; a sequence is shuffled, anything else is read as it comes, and
            again from the start if the budget is larger and it can be read again.
        steps: of the optimizer.
        tokens: that count, in all processes; as steps, by what the first batches hold.
        minutes: that it may take, when run anew as when resumed.
        lr: learning rate, if not that of the other stages.
    """

    batches: Iterable[Batch]
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    lr: float | None = None


@dataclass(frozen=True)
class Text:
    """The batches of a stage, looked at.

    Attributes:
        first: the first of them.
        tokens: how many tokens a batch has that count, on the average.
        count: how many batches there are; None if only the end will tell.
        again: whether they can be read more than once.
    """

    batches: Iterable[Batch]
    first: Batch
    tokens: float
    count: int | None
    again: bool


def look(number: int, stage: Stage) -> Text:
    """See what text the ``number``-th stage has.

    Raises:
        HealError: there is none, or no token of it counts.
        OptionError: a budget out of range.
        RecordError: a batch that is none.
    """
    check_count("steps", stage.steps)
    check_count("tokens", stage.tokens)
    check_bound("minutes", stage.minutes, "a time")
    if isinstance(stage.batches, dict):
        raise HealError(f"stage {number}: this is one batch, not batches: give a list of them")
    batches, again = stage.batches, True
    if isinstance(batches, Iterator):
        sample, again = list(itertools.islice(batches, _SAMPLE)), False
        batches = itertools.chain(sample, batches)
    else:
        sample = list(itertools.islice(batches, _SAMPLE))
    if not sample:
        raise HealError(f"stage {number} has no text: give at least one batch of sequences of two tokens")
    counts = [count_tokens(check_batch(index, batch)) for index, batch in enumerate(sample)]
    if not sum(counts):
        raise HealError(
            f"stage {number}: no token counts, in none of the first {len(counts)} batches: all are masked, or every "
            "sequence has just one. Give sequences of at least two tokens"
        )
    known = len(batches) if isinstance(batches, Sized) else None
    return Text(batches, sample[0], sum(counts) / len(counts), known, again)


def steps_of(number: int, stage: Stage, text: Text, batches_per_step: int) -> int:
    """How many steps a stage has at most; ``FOREVER`` if the clock ends it.

    Raises:
        HealError: the text is too short for one step.
        OptionError: nothing says where it ends.
    """
    if text.count is not None and text.count < batches_per_step:
        raise HealError(
            f"stage {number} has {text.count} batches of about {text.tokens:.0f} tokens, and one step takes "
            f"{batches_per_step} of them, about {text.tokens * batches_per_step:.0f} tokens: give more text, or lower "
            "gradient_accumulation_steps"
        )
    known: list[int] = [] if stage.steps is None else [stage.steps]
    if stage.tokens is not None:
        known.append(math.ceil(stage.tokens / (text.tokens * batches_per_step)))
    if known:
        return min(known)
    if stage.minutes is not None:
        return FOREVER
    if text.count is None:
        raise OptionError(f"stage {number} is a stream without an end: give steps=, tokens= or minutes=")
    return text.count // batches_per_step


def count_tokens(batch: Batch) -> int:
    """How many tokens of a batch count."""
    return int((targets(batch) != IGNORED).sum())


def weighed(batch: Batch, weight: float) -> Batch:
    """``batch``, each of whose tokens counts ``weight`` times in the loss."""
    return {**batch, WEIGHT: weight} if weight != 1 else batch


def weight_of(batch: Batch) -> float:
    """How much a token of ``batch`` counts in the loss."""
    weight = batch.get(WEIGHT, 1.0)
    assert isinstance(weight, float)  # none but `weighed` writes it
    return weight


class Listed(Dataset[Batch]):
    """A sequence of batches, each an item of its own: what the Trainer makes batches of."""

    def __init__(self, batches: Sequence[Batch], dress: Dress) -> None:
        self._batches, self._dress = batches, dress

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        return self._dress(self._batches[index])


class Streamed(IterableDataset[Batch]):
    """The same for batches that come one after the other."""

    def __init__(self, batches: Iterable[Batch], dress: Dress) -> None:
        self._batches, self._dress = batches, dress

    def __iter__(self) -> Iterator[Batch]:
        return map(self._dress, self._batches)


def dataset(batches: Iterable[Batch], dress: Dress) -> Listed | Streamed:
    return Listed(batches, dress) if isinstance(batches, Sequence) else Streamed(batches, dress)


def only(items: Sequence[Batch]) -> Batch:
    """The collator: items are batches already."""
    (item,) = items
    return item
