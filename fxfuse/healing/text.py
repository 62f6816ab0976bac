"""Text to heal on: kinds of it, and of each a part that is not fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from fxfuse._common.bounds import check_bound
from fxfuse.data.batches import Batch, check_batch
from fxfuse.data.own_text import SELF
from fxfuse.errors import HealError, OptionError, nearest

Part: TypeAlias = Iterable[Batch] | Literal["self"]
"""Batches, or ``"self"`` for some that the model writes itself."""

Text: TypeAlias = Part | Mapping[str, Part]
"""One kind of text, or several by their names."""


@dataclass(frozen=True)
class Kind:
    """Batches of one kind of text.

    Attributes:
        name: what the caller calls it; empty where there is but one.
        fitted: what is fitted to.
        held: what is held out, to choose and to judge by.
        weight: how much a token of it counts; 1 is the mean over kinds.
    """

    name: str
    fitted: tuple[Batch, ...]
    held: tuple[Batch, ...]
    weight: float = 1.0

    def part(self, held: bool) -> tuple[Batch, ...]:
        """The batches that are held out, or the others."""
        return self.held if held else self.fitted


def kinds(
    text: Text,
    share: float,
    written: Callable[[], Iterable[Batch]],
    weights: Mapping[str, float] | None = None,
) -> tuple[Kind, ...]:
    """The kinds of text, of each a ``share`` of the batches held out, spread evenly, and at least one.

    Args:
        text: by the caller.
        share: between 0 and 1.
        written: has the model write some itself.
        weights: how much a token of each kind counts, in proportion; those that are not named count 1.

    Raises:
        HealError: there is none, or fewer than two batches of one kind.
        RecordError: a batch that is no mapping.
        OptionError: ``share`` or a weight out of range, or a weight of a kind that there is not.
    """
    if not 0 < share < 1:
        raise OptionError(f"held_out lies between 0 and 1 (0.2, say), not at {share}")
    given: Mapping[str, Part] = {"": text} if not isinstance(text, str | Mapping) else _by_name(text)
    if not given:
        raise HealError("no text was given: heal needs batches of tokens")
    if any(isinstance(part, Tensor | bool) for part in given.values()):
        raise HealError(f"a single batch ({', '.join(map(str, given))}) is no text: give a list of batches")
    weighed = _weights(weights or {}, tuple(given))
    made: list[Kind] = []
    for name, part in given.items():
        if isinstance(part, str) and part != SELF:
            raise HealError(f"{part!r} is no text: give batches, or {SELF!r} for text that the model writes itself")
        made.append(_kind(name, written() if isinstance(part, str) else part, share, weighed[name]))
    return tuple(made)


def _weights(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The weight of each kind of text, 1 on the average."""
    for name, weight in weights.items():
        if name not in names:
            known = nearest(name, names) if any(names) else ": give batches={name: ...}"
            raise OptionError(f"weights: no kind of text is called {name!r}{known}")
        check_bound(f"weights[{name!r}]", weight, "a positive number")
        if not 0 < weight < math.inf:
            raise OptionError(f"weights[{name!r}] is a positive number, not {weight!r}: leave out what is not to count")
    mean = sum(weights.get(name, 1.0) for name in names) / len(names)
    return {name: weights.get(name, 1.0) / mean for name in names}


def _by_name(text: Mapping[str, Part] | Literal["self"]) -> Mapping[str, Part]:
    return {text: text} if isinstance(text, str) else text


def _kind(name: str, batches: Iterable[Batch], share: float, weight: float) -> Kind:
    own = [check_batch(number, batch, tokens=False) for number, batch in enumerate(batches)]
    if len(own) < 2:
        of = f" of the text {name!r}" if name else ""
        raise HealError(
            f"there are {len(own)} batches{of}, and one is held out: give at least two, of sequences of their own; "
            "128 sequences of 256 tokens serve most models"
        )
    chosen = {n for n in range(len(own)) if int((n + 1) * share) > int(n * share)} or {len(own) - 1}
    if len(chosen) == len(own):
        chosen.remove(0)
    held = tuple(batch for number, batch in enumerate(own) if number in chosen)
    return Kind(name, tuple(batch for number, batch in enumerate(own) if number not in chosen), held, weight)
