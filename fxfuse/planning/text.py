"""The user's text as what a search measures on, and as the prompt that costs are measured with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fxfuse.data.batches import Batch, check_batch
from fxfuse.errors import RecordError


def first_tokens(batches: Iterable[Batch], most: int | None) -> list[Batch]:
    """The first batches, until they hold ``most`` tokens; all if None.

    Raises:
        RecordError: there are none, or one is no mapping with ``input_ids``.
    """
    made: list[Batch] = []
    tokens = 0
    for number, batch in enumerate(batches):
        if most is not None and tokens >= most:
            break
        made.append(check_batch(number, batch))
        tokens += _ids(batch).numel()
    if not made:
        raise RecordError("there is no batch to measure on: give at least one, of sequences of two tokens")
    return made


def prompt(batches: Iterable[Batch], context: int, sequences: int = 1) -> Tensor:
    """``[sequences, context]`` tokens of ``batches``, begun again from the first where they are fewer."""
    ids = torch.cat([_ids(batch).flatten() for batch in batches])
    wanted = sequences * context
    return ids.repeat(-(-wanted // len(ids)))[:wanted].view(sequences, context)


def _ids(batch: Batch) -> Tensor:
    ids = batch["input_ids"]
    assert isinstance(ids, Tensor)  # as checked
    return ids
