"""Heal: get back, in the weights, what a plan has cost."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fxfuse._common.bounds import check_bound, check_count
from fxfuse._common.progress import bar
from fxfuse._torch.compiled import original
from fxfuse._torch.dynamo import originals_forbidden
from fxfuse.data.batches import eval_mode
from fxfuse.data.own_text import written_by
from fxfuse.errors import HealError, OptionError
from fxfuse.healing.fit import fit_step
from fxfuse.healing.local import Training, train_step
from fxfuse.healing.pair import pairs
from fxfuse.healing.state import State
from fxfuse.healing.steps import Improve, Outcome, Sample, front_to_back
from fxfuse.healing.text import Kind, Text, kinds
from fxfuse.measure.evaluation import evaluate
from fxfuse.measure.planned import Planned
from fxfuse.measure.resume import digest_batch
from fxfuse.model.force import uncompiled
from fxfuse.model.healed import healed_for, mark_healed
from fxfuse.plan import Plan

Method: TypeAlias = Literal["fit", "local"]

SHARES = (1.0, 0.75, 0.5, 0.25)
"""How much of the change is tried, the most first: the whole may be too much for text of other kinds."""


OWN_TOKENS = 16_384
"""How much a model writes that is healed on text of its own."""


@dataclass(frozen=True)
class Divergence:
    """KL(original || planned) on text held out, nats per token, before healing and after."""

    before: float
    after: float


@dataclass(frozen=True)
class Healing:
    """What :func:`heal` did; ``str()`` is a table.

    Attributes:
        outcomes: of each step of each method, in the order in which they were made.
        kl: by kind of text, on the batches that were held out.
        share: how much of the change was kept: 1 is all of it, 0 means that the weights are as they were.
        tokens: how many were fitted to, and held out.
        seconds: that it took.
    """

    outcomes: tuple[Outcome, ...]
    kl: Mapping[str, Divergence]
    share: float
    tokens: tuple[int, int]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{'KL to the original, nats/token':31}  {'unhealed':>9}  {'healed':>9}"]
        lines += [f"{name or 'text held out':31}  {kl.before:9.4g}  {kl.after:9.4g}" for name, kl in self.kl.items()]
        for method, done in (("fit", "sums were fitted"), ("local", "regions were trained")):
            own = [each for each in self.outcomes if each.method == method]
            if own:
                lines.append(f"{sum(each.after < each.before for each in own)} of {len(own)} {done}")
        if self.share < 1:
            lines.append(
                f"{self.share:.0%} of the change was kept"
                if self.share
                else "nothing was changed: no share of the change brings every kind of text nearer to the original"
            )
        lines.append(f"{self.tokens[0]:,} tokens fitted to, {self.tokens[1]:,} held out, {self.seconds:.0f} s")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The attributes as a JSON object."""
        return json.dumps(asdict(self), indent=2)


@torch.no_grad()
def heal(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str],
    batches: Text,
    method: Method | Sequence[Method] = "fit",
    *,
    held_out: float = 0.2,
    minutes: float | None = None,
    block: int = 8192,
    training: Training = Training(),  # noqa: B008 - it is frozen
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Healing:
    """Change the weights of ``model`` so that, under ``plan``, it computes again what it computed without.

    Parameters keep their names, shapes and dtypes. Nothing is written into them before all is done, and nothing at all
    unless the planned model comes nearer to the original on every kind of text that was held out. From then on the
    model is damaged without the plan. It carries it (:mod:`fxfuse.model.healed`): under no plan, or another, it is
    refused.

    ``"fit"`` needs no gradients: front to back, each linear map by which a branch writes to the residual stream (down
    and output projections, with their biases) is refitted by ridge regression, so that the stream of the planned model
    follows the original's (:mod:`fxfuse.healing.fit`). ``"local"`` trains all weights of one region after the other, by
    gradient descent, to the same end (:mod:`fxfuse.healing.local`). ``["fit", "local"]`` goes on from the one to the
    other: minutes, then an hour.

    Args:
        model: a language model, with all that the plan drops still in it; compiled or not. It runs in eval mode.
        plan: what it will follow, or the path of that.
        batches: keyword arguments of the model's calls, such as ``{"input_ids": [batch, length]}``. Several kinds of
            text guard against a fit that helps one and hurts another: give ``{"code": ..., "prose": ...}``. Positions
            where ``attention_mask`` is 0 do not count. ``"self"``, alone or as a kind, is 16,384 tokens that the model
            writes itself (:func:`fxfuse.data.own_text.written_by` writes more).
        method: how, or several, each going on from the one before.
        held_out: share of the batches of each kind that is not fitted to, but chooses and decides.
        minutes: how long to go on; steps that are not begun by then stay as they are. Judging comes on top.
        block: the most inputs of a map that are solved for at once, which takes ``8 * block ** 2`` bytes a few times
            over. A wider map, as of a group of FFNs, is solved in blocks.
        training: how regions are trained.
        resume: a folder that keeps what each step gave; an interrupted run goes on from it. Remove it when done.
        progress: show on stderr how far it is.

    Memory, besides: the stream of each batch, twice, and a second copy of the weights that are fitted.

    Raises:
        HealError: too little text; nothing in the model can be fitted; a plan without edits; a state of something else.
        PlanError: the plan does not fit the model, or was applied to it already.
        CaptureError: the model cannot be traced to one graph, or not be run in parts.
        RecordError, NotFiniteError: the model cannot be called with a batch, or computes NaN.
        OptionError: an option out of range.
    """
    started = time.monotonic()
    chosen = Plan.load(plan) if isinstance(plan, str | os.PathLike) else plan
    own = original(model)
    methods = _checked(chosen, method)
    check_count("block", block)
    check_bound("minutes", minutes, "a time")
    until = math.inf if minutes is None else started + 60 * minutes
    if healed_for(own) is not None:
        raise HealError("the model was healed already, so it is no longer the original: load that again")
    text = kinds(batches, held_out, lambda: written_by(own, OWN_TOKENS, progress=progress))
    improves: dict[str, Improve] = {
        "fit": partial(fit_step, block=block),
        "local": partial(train_step, training=training),
    }
    settings = {"fit": str(block), "local": str(training)}
    outcomes: list[Outcome] = []
    weights: dict[str, Tensor] = {}
    anew: set[str] = set()
    with eval_mode(own), uncompiled(own), originals_forbidden():
        for name in methods:
            samples = _samples(own, chosen, text, weights, name)
            begun = f"{settings[name]} from {digest_batch(weights)}"  # what a method found depends on those before it
            state = State(Path(resume) / name, own, chosen, text, begun) if resume is not None else None
            weights |= _improve(samples, name, improves[name], state, outcomes, until, progress)
            anew |= {each for step in samples[0].pair.steps for each in step.anew}
            del samples
        change = _Change(own, weights, frozenset(anew))
        share, kl = _share(own, chosen, text, change, progress)
    for name, new in change.share(share).items():
        own.get_parameter(name).copy_(new)
    if share:
        mark_healed(own, chosen)
    tokens = outcomes[0].tokens if outcomes else (0, 0)
    return Healing(tuple(outcomes), kl, share, tokens, time.monotonic() - started)


def _checked(plan: object, method: object) -> list[str]:
    methods = [method] if isinstance(method, str) else list(method) if isinstance(method, list | tuple) else []
    known = get_args(Method)
    if not methods or not set(methods) <= set(known):
        raise OptionError(f"method={method!r}: choose of {', '.join(known)}, or give a list of them")
    if len(set(methods)) < len(methods):
        raise OptionError(f"method={method!r} names one twice")
    if not isinstance(plan, Plan):
        raise OptionError(f"plan is a fxfuse.Plan or the path of one, not {plan!r}")
    if not plan:
        raise HealError("the plan is empty: it costs nothing, so there is nothing to heal")
    return methods


def _samples(
    model: nn.Module, plan: Plan, text: Sequence[Kind], weights: Mapping[str, Tensor], method: str
) -> list[Sample]:
    marked = [(kind.name, held, batch) for kind in text for held in (False, True) for batch in _part(kind, held)]
    made = pairs(model, plan, [batch for _, _, batch in marked], weights, regions=method == "local")
    if not made[0].steps:
        raise HealError("nothing in the model can be healed: after the first edit no branch writes by a linear map")
    return [Sample(pair, name, held) for pair, (name, held, _) in zip(made, marked, strict=True)]


def _improve(
    samples: Sequence[Sample],
    method: str,
    improve: Improve,
    state: State | None,
    outcomes: list[Outcome],
    until: float,
    progress: bool,
) -> dict[str, Tensor]:
    steps = len(samples[0].pair.steps)
    if state is not None:
        outcomes += state.outcomes
    title, unit = {"fit": ("fitting", "sums"), "local": ("training", "regions")}[method]
    with bar(title, unit, steps, progress) as advance:

        def keep(weights: Mapping[str, Tensor], outcome: Outcome) -> None:
            if state is not None:
                state.add(weights, outcome)
            outcomes.append(outcome)

        known = list(state.weights) if state is not None else []
        return front_to_back(samples, improve, known, keep, lambda: advance(1), until)


def _part(kind: Kind, held: bool) -> Sequence[Mapping[str, object]]:
    return kind.held if held else kind.fitted


@dataclass(frozen=True)
class _Change:
    """New weights of a model, and which of them have nothing to do with the old ones."""

    model: nn.Module
    weights: Mapping[str, Tensor]
    anew: frozenset[str]

    def share(self, share: float) -> dict[str, Tensor]:
        """The weights with so much of the change; with none, they are as they were."""
        made: dict[str, Tensor] = {}
        for name, new in self.weights.items():
            old = self.model.get_parameter(name)
            new = new.to(old.device)
            start = torch.zeros_like(old) if name in self.anew else old
            made[name] = old if not share else new if share == 1 else torch.lerp(start, new, share)
        return made


def _share(
    model: nn.Module, plan: Plan, text: Sequence[Kind], change: _Change, progress: bool
) -> tuple[float, dict[str, Divergence]]:
    """How much of the change to keep, and what it does to each kind of text."""
    planned = Planned(model)
    planned.plan = plan

    def measured(share: float) -> dict[str, float]:
        planned.weights = change.share(share)
        found: dict[str, float] = {}
        for kind in text:
            kl = evaluate(planned, kind.held, reference=model, progress=progress).kl
            assert kl is not None  # there is a reference
            found[kind.name] = kl
        return found

    unhealed = measured(0.0)
    best, healed, least = 0.0, unhealed, 1.0
    for share in SHARES:
        now = measured(share)
        left = _mean_ratio(now, unhealed)
        if left < least and all(now[name] < unhealed[name] for name in now):
            best, healed, least = share, now, left
        elif best:
            break  # less of the change is less good
    return best, {name: Divergence(unhealed[name], healed[name]) for name in unhealed}


def _mean_ratio(kl: Mapping[str, float], before: Mapping[str, float]) -> float:
    """The geometric mean over kinds of text of how much of the divergence is left."""
    tiny = 1e-12
    return math.exp(sum(math.log((kl[name] + tiny) / (before[name] + tiny)) for name in kl) / len(kl))
