"""Fit: without gradients, from the front to the back, lead the planned stream back to the original's.

At each residual sum the linear maps by which branches write to it are refitted by ridge regression, so that the stream
after it is what it was in the original model; what comes later then sees the healed stream. This is the closed form of
Ghosted Layers (arXiv 2605.15491) and of NBL (arXiv 2505.21077), at every sum, on the maps that the model has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxfuse.healing.ridge import Sums, best_strength
from fxfuse.healing.steps import Outcome, Sample, check_amount

ROUNDS = 3
"""How often a map whose output is normed is fitted: each time at the lengths that its outputs have by then."""

SHARES = (1.0, 0.5, 0.25)
"""Parts of a change that are tried where a norm bends what it does."""


@torch.no_grad()
def fit_step(samples: Sequence[Sample], block: int) -> tuple[dict[str, Tensor], Outcome]:
    """Refit the maps of the step at which all samples stand: their new parameters by name, if any are better.

    Args:
        samples: which have reached the step.
        block: the most columns that are solved for at once; more are solved in blocks, each with those before it
            changed (block-coordinate descent).

    Raises:
        HealError: fewer tokens than the stream has channels.
        NotFiniteError: NaN or infinity.
    """
    step = samples[0].pair.step
    weights = {name: torch.zeros_like(old) for name, old in samples[0].pair.weights().items() if name in step.anew}
    columns = sum(map_.columns for map_ in step.maps)
    bent = any(map_.norm is not None for map_ in step.maps)
    errors: list[float] = []
    strength = 0.0
    for start in [*range(0, columns, block)] * (ROUNDS if bent else 1):
        part = slice(start, min(start + block, columns))
        fitted, held = _sums(samples, part, weights)
        check_amount(fitted.tokens, len(fitted.cross))
        errors.append(_error(held, None))
        if (best := best_strength(fitted, held)) is None:
            continue
        whole = best[1].new_zeros(len(best[1]), columns)
        whole[:, part] = best[1]
        if bent:
            better = _walked(samples, whole, weights, errors[-1])
            if better is None:
                continue
            error, changed = better
        else:
            error, changed = _error(held, best[1]), samples[0].pair.changed(whole, weights)
        errors.append(error)
        strength = best[0]
        weights |= changed
    tokens = fitted.tokens, sum(sums.tokens for sums in held)
    return weights, Outcome("fit", step.branches, errors[0], errors[-1], tokens, strength, step.refused)


def _walked(
    samples: Sequence[Sample], change: Tensor, weights: Mapping[str, Tensor], error: float
) -> tuple[float, dict[str, Tensor]] | None:
    """The longest part of a change that lessens the stream's ``error`` on held-out text, as it comes out of its norms.

    The error it leaves and the parameters after it, or None if no part does.
    """
    for share in SHARES:
        changed = samples[0].pair.changed(share * change, weights)
        parts: dict[str, Sums] = {}
        for sample in samples:
            if sample.held:
                residual, weight = _missing(sample, {**weights, **changed})
                nothing = residual.new_zeros(len(residual), 0)
                empty = Sums.empty(0, residual.shape[-1], residual.device)
                parts.setdefault(sample.domain, empty).add(nothing, residual, weight)
        if (left := _error([*parts.values()], None)) < error * (1 - 1e-4):
            return left, changed
    return None


def _sums(samples: Sequence[Sample], part: slice, weights: Mapping[str, Tensor]) -> tuple[Sums, list[Sums]]:
    """Of what is fitted to, and of what is held out, by domain."""
    made: dict[str | None, Sums] = {}
    for sample in samples:
        inputs = sample.pair.inputs(weights)[:, part]
        residual, weight = _missing(sample, weights)
        key = sample.domain if sample.held else None
        if key not in made:
            made[key] = Sums.empty(inputs.shape[-1], residual.shape[-1], inputs.device)
        made[key].add(inputs, residual, weight)
    return made.pop(None), list(made.values())


def _missing(sample: Sample, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the stream lacks, ``[tokens, d]``, and how much each token counts.

    An attention sink is a hundred times longer than other tokens, so each counts by its relative error.
    """
    goal, stream = sample.pair.goal(), sample.pair.stream(weights)
    kind = torch.promote_types(goal.dtype, torch.float32)
    goal = goal.to(kind)
    return goal - stream.to(kind), 1 / goal.square().sum(-1).clamp_min(torch.finfo(kind).tiny)


def _error(held: Sequence[Sums], change: Tensor | None) -> float:
    """Relative error of the stream: the mean over domains."""
    return sum(sums.error(change) for sums in held) / len(held)
