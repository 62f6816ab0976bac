"""Local distillation: the weights of one region after the other are trained so that the stream after it is right.

A region is what the stream passes through from one FFN to the next. Its input is the planned stream, healed until
there; its goal is the original's stream at its end: no gradient runs through more than one region, so that memory and
time are those of one. Source: block-local distillation of Puzzle (arXiv 2411.19146, section 3), on the student's own
stream.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxfuse.errors import CaptureError, NotFiniteError
from fxfuse.healing.steps import Outcome, Sample, check_amount


@dataclass(frozen=True)
class Training:
    """How a region is trained: Adam with a learning rate that falls to nothing along a cosine.

    Attributes:
        epochs: times that all text is read.
        rate: the highest learning rate, relative to the root mean square of each parameter.
    """

    epochs: int = 3
    rate: float = 3e-3


def train_step(samples: Sequence[Sample], training: Training) -> tuple[dict[str, Tensor], Outcome]:
    """Train the region that all samples have reached: its new parameters by name, if any are better.

    Of the epochs that one is kept after which the error on text held out is least.

    Raises:
        HealError: fewer tokens than the stream has channels.
        NotFiniteError: the error is NaN.
    """
    with torch.no_grad():
        own = samples[0].pair.weights()
        goals = [sample.pair.goal() for sample in samples]
        before = _held_out(samples, goals, own)
    counts = [sum(len(g) for s, g in zip(samples, goals, strict=True) if s.held == held) for held in (False, True)]
    check_amount(counts[0], goals[0].shape[-1])
    masters = {
        name: nn.Parameter(value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True))
        for name, value in own.items()
    }
    groups = [{"params": [p], "lr": training.rate * _size(p)} for p in masters.values()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    order = [n for n, sample in enumerate(samples) if not sample.held]
    total = training.epochs * len(order)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 * (1 + math.cos(math.pi * n / total)))
    best: dict[str, Tensor] = {}
    least = before
    shuffled = random.Random(0)
    for _ in range(training.epochs):
        shuffled.shuffle(order)
        for n in order:
            now = {name: master.to(own[name].dtype) for name, master in masters.items()}
            with torch.enable_grad():
                loss = _error(samples[n], goals[n], now)
            if not loss.requires_grad:
                raise CaptureError("a part of the model runs without gradients: it can be fitted, and not trained")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            now = {name: master.to(own[name].dtype) for name, master in masters.items()}
            error = _held_out(samples, goals, now)
        if error < least:
            least, best = error, {name: value.detach().clone() for name, value in now.items()}
    step = samples[0].pair.step
    return best, Outcome("local", step.branches, before, least, (counts[0], counts[1]), 0.0, {})


def _size(parameter: Tensor) -> float:
    """The root mean square of a parameter; of one that is all zeros, a small number."""
    return max(float(parameter.detach().square().mean().sqrt()), 1e-3)


def _error(sample: Sample, goal: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Relative error of the stream after the region, the mean over tokens."""
    kind = torch.promote_types(goal.dtype, torch.float32)
    goal = goal.to(kind)
    missing = goal - sample.pair.stream(weights).to(kind)
    return (missing.square().sum(-1) / goal.square().sum(-1).clamp_min(torch.finfo(kind).tiny)).mean()


def _held_out(samples: Sequence[Sample], goals: Sequence[Tensor], weights: Mapping[str, Tensor]) -> float:
    """The error on text held out: the mean over domains of the mean over tokens."""
    errors: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for sample, goal in zip(samples, goals, strict=True):
        if sample.held:
            errors[sample.domain].append((float(_error(sample, goal, weights)), len(goal)))
    means = [sum(e * n for e, n in each) / sum(n for _, n in each) for each in errors.values()]
    if not all(map(math.isfinite, means)):
        raise NotFiniteError("NaN or infinity in the stream of the model. Are the weights whole? Try float32")
    return sum(means) / len(means)
