"""From the front to the back: one step after the other is improved, and what comes later sees it improved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from fxfuse.errors import HealError
from fxfuse.healing.pair import Pair


@dataclass(frozen=True)
class Sample:
    """A batch on its way, and what it is for.

    Attributes:
        pair: both models, standing at the same step.
        domain: the kind of text.
        held: it chooses and judges, and is not fitted to.
    """

    pair: Pair
    domain: str
    held: bool


@dataclass(frozen=True)
class Outcome:
    """What became of one step.

    Attributes:
        method: by which it was improved.
        branches: whose weights they are.
        before, after: relative error of the stream on text held out, ``mean |x' - x|^2 / |x|^2``.
        tokens: how many were fitted to, and held out.
        strength: of the ridge, relative to the mean of the Gram matrix' diagonal.
        refused: why the maps of other branches were not fitted, by branch.
    """

    method: str
    branches: tuple[str, ...]
    before: float
    after: float
    tokens: tuple[int, int]
    strength: float
    refused: Mapping[str, str]


Improve: TypeAlias = Callable[[Sequence[Sample]], tuple[dict[str, Tensor], Outcome]]
"""Finds better weights for the step that all samples have reached: those that changed, by name."""


def front_to_back(
    samples: Sequence[Sample],
    improve: Improve,
    known: Sequence[Mapping[str, Tensor]] = (),
    keep: Callable[[Mapping[str, Tensor], Outcome], None] = lambda weights, outcome: None,
    done: Callable[[], None] = lambda: None,
    until: float = math.inf,
) -> dict[str, Tensor]:
    """Improve all steps, or as many as there is time for: the new parameters by name.

    Args:
        samples: at the start of their way.
        improve: what is done at each step.
        known: what a run before found for the first steps.
        keep: is given what each further step found.
        done: is called after each step.
        until: a time of ``time.monotonic()`` after which no further step is begun.
    """
    weights: dict[str, Tensor] = {}
    for number in range(len(samples[0].pair.steps)):
        if time.monotonic() > until:
            break
        for sample in samples:
            sample.pair.reach()
        if number < len(known):
            own = samples[0].pair.weights()  # a file's tensors are on the CPU
            new = {name: value.to(own[name].device) for name, value in known[number].items()}
        else:
            new, outcome = improve(samples)
            keep(new, outcome)
        for sample in samples:
            sample.pair.leave(new)
        weights |= new
        done()
    return weights


def check_amount(tokens: int, channels: int) -> None:
    """Raise if ``tokens`` to fit to are too few for a stream of ``channels``."""
    if tokens < channels:
        raise HealError(
            f"{tokens} tokens to fit to are too few for a stream of {channels} channels: give at least {channels:,}, "
            "better twenty times as many, and those that are held out beside them"
        )
