"""The methods of healing as ``heal`` runs them, one after the other, each going on from the weights of those before."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fxfuse._common.progress import bar
from fxfuse._torch.dynamo import originals_forbidden
from fxfuse.data.batches import eval_mode
from fxfuse.errors import HealError
from fxfuse.healing.course import Distillation, learn
from fxfuse.healing.fit import fit_step
from fxfuse.healing.local import Training, train_step
from fxfuse.healing.mapped import Mapped
from fxfuse.healing.pair import Stops, pairs
from fxfuse.healing.stages import Stage, weighed
from fxfuse.healing.state import State, digest_text
from fxfuse.healing.steps import Improve, Outcome, Sample, front_to_back
from fxfuse.healing.text import Kind
from fxfuse.healing.training import StageRun
from fxfuse.measure.resume import digest_batch
from fxfuse.model.force import uncompiled
from fxfuse.plan import Plan

Method: TypeAlias = Literal["fit", "local", "distill"]

METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Patient:
    """What is healed, and with what.

    Attributes:
        original: the model; it stays as it is.
        planned: the same, or a copy that shares its weights and has what more the plan needs: that runs under the plan.
        plan: what it follows.
        text: the kinds of text.
    """

    original: nn.Module
    planned: Mapped
    plan: Plan
    text: tuple[Kind, ...]


@dataclass(frozen=True)
class Ways:
    """How the methods do their work: their options.

    Attributes:
        block: the most inputs of a map that are solved for at once.
        training: of "local".
        distillation: of "distill".
        resume: the folder in which each keeps what it has done; None keeps nothing.
        progress: show on stderr how far it is.
    """

    block: int
    training: Training
    distillation: Distillation
    resume: Path | None
    progress: bool


@dataclass(frozen=True)
class Treated:
    """What a method has made of the weights.

    Attributes:
        weights: those that changed, by name.
        anew: which of them have nothing to do with their old values.
        outcomes: of its steps, if it has any.
        stage: what became of the training, if it was one.
    """

    weights: Mapping[str, Tensor]
    anew: frozenset[str] = field(default_factory=frozenset)
    outcomes: tuple[Outcome, ...] = ()
    stage: StageRun | None = None


def treat(patient: Patient, method: Method, ways: Ways, start: Mapping[str, Tensor], until: float) -> Treated:
    """Let one method go on from the weights ``start``.

    Args:
        patient: what is healed.
        method: by what.
        ways: options.
        start: values that stand for those of the model, by name.
        until: a time of ``time.monotonic()`` after which nothing further is begun.

    Raises:
        HealError, CaptureError, RecordError, NotFiniteError: see :func:`fxfuse.healing.heal.heal`.
    """
    if method == "distill":
        return _distil(patient, ways, start, until)
    improves: dict[str, tuple[Improve, Stops, str]] = {
        "fit": (partial(fit_step, block=ways.block), "sums", str(ways.block)),
        "local": (partial(train_step, training=ways.training), "regions", str(ways.training)),
    }
    improve, at, settings = improves[method]
    with eval_mode(patient.original, patient.planned.model), uncompiled(patient.original), originals_forbidden():
        samples = samples_of(patient, at, start)
        begun = f"{settings} from {digest_batch(start)}"  # what a method makes depends on those before it
        place = None if ways.resume is None else ways.resume / method
        state = None if place is None else State(place, patient.original, patient.plan, patient.text, begun)
        weights, outcomes = _improve(samples, method, improve, state, until, ways.progress)
    return Treated(weights, frozenset(name for step in samples[0].pair.steps for name in step.anew), tuple(outcomes))


def samples_of(patient: Patient, at: Stops, start: Mapping[str, Tensor]) -> list[Sample]:
    """All batches at the start of both models, which stop ``at`` such steps.

    Raises:
        HealError: there is no such step.
    """
    marked = [(kind, held, batch) for kind in patient.text for held in (False, True) for batch in kind.part(held)]
    batches = [batch for _, _, batch in marked]
    made = pairs(patient.original, patient.plan, batches, start, at, patient.planned.model)
    if not made[0].steps:
        raise HealError(
            f"nothing in the model can be healed at its {at}: after the first edit no branch writes to the stream by a "
            "linear map that can be fitted (a norm may follow it). 'local' and 'distill' train what there is"
        )
    for pair, (kind, _, _) in zip(made, marked, strict=True):
        pair.weight = kind.weight
    return [Sample(pair, kind.name, held) for pair, (kind, held, _) in zip(made, marked, strict=True)]


def _improve(
    samples: Sequence[Sample], method: Method, improve: Improve, state: State | None, until: float, progress: bool
) -> tuple[dict[str, Tensor], list[Outcome]]:
    outcomes = list(state.outcomes) if state is not None else []
    title, unit = {"fit": ("fitting", "sums"), "local": ("training", "regions")}[method]
    with bar(title, unit, len(samples[0].pair.steps), progress) as advance:

        def keep(weights: Mapping[str, Tensor], outcome: Outcome) -> None:
            if state is not None:
                state.add(weights, outcome)
            outcomes.append(outcome)

        known = list(state.weights) if state is not None else []
        return front_to_back(samples, improve, known, keep, lambda: advance(1), until), outcomes


def _distil(patient: Patient, ways: Ways, start: Mapping[str, Tensor], until: float) -> Treated:
    left = None if until == math.inf else (until - time.monotonic()) / 60
    if left is not None and left <= 0:
        return Treated({})
    how = ways.distillation
    text = [weighed(batch, kind.weight) for kind in patient.text for batch in kind.fitted]
    with torch.enable_grad():
        made = learn(
            patient.original,
            patient.planned,
            patient.plan,
            [Stage(text, steps=how.steps, minutes=left)],
            how,
            start=start,
            folder=None if ways.resume is None else ways.resume / "distill",
            of=digest_text(patient.text),
            progress=ways.progress,
        )
    return Treated(made.values, stage=made.stages[0])
