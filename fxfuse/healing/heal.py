"""Heal: get back, in the weights, what a plan has cost."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fxfuse._common.bounds import check_bound, check_count
from fxfuse._torch.compiled import original
from fxfuse._torch.dynamo import originals_forbidden
from fxfuse.data.batches import eval_mode
from fxfuse.data.own_text import written_by
from fxfuse.errors import HealError, OptionError
from fxfuse.healing.commit import commit
from fxfuse.healing.course import Distillation
from fxfuse.healing.judge import Change, Divergence, Judge, Verdict
from fxfuse.healing.local import Training
from fxfuse.healing.mapped import mapped
from fxfuse.healing.methods import METHODS, Method, Patient, Treated, Ways, treat
from fxfuse.healing.stages import count_tokens
from fxfuse.healing.steps import Outcome
from fxfuse.healing.text import Kind, Text, kinds
from fxfuse.healing.training import StageRun
from fxfuse.model.force import uncompiled
from fxfuse.model.healed import healed_for
from fxfuse.model.spread import spread_weights
from fxfuse.plan import Plan

HELD_OUT = 0.2
"""Share of the batches that chooses and decides, and is not fitted to."""

OWN_TOKENS = 16_384
"""How much a model writes that is healed on text of its own."""


@dataclass(frozen=True)
class Healing:
    """What :func:`heal` did; ``str()`` is a table.

    Attributes:
        outcomes: of each step of "fit" and "local", in the order in which they were made.
        kl: by kind of text, on those of the tokens held out that judge.
        share: how much of its change was kept of the last method of which any was: 0 means that the weights are as they
            were.
        tokens: how many were fitted to, and held out.
        seconds: that it took.
        verdicts: what was kept of each method's change.
        distilled: the course of "distill".
    """

    outcomes: tuple[Outcome, ...]
    kl: Mapping[str, Divergence]
    share: float
    tokens: tuple[int, int]
    seconds: float
    verdicts: tuple[Verdict, ...] = ()
    distilled: StageRun | None = None

    def __str__(self) -> str:
        lines = [f"{'KL to the original, nats/token':31}  {'unhealed':>9}  {'healed':>9}"]
        lines += [f"{name or 'text held out':31}  {kl.before:9.4g}  {kl.after:9.4g}" for name, kl in self.kl.items()]
        for method, done in (("fit", "sums were fitted"), ("local", "regions were trained")):
            own = [each for each in self.outcomes if each.method == method]
            if own:
                lines.append(f"{sum(each.after < each.before for each in own)} of {len(own)} {done}")
        if self.distilled is not None:
            lines.append(f"distilled in {self.distilled}")
        if self.share:
            lines += [str(verdict) for verdict in self.verdicts if verdict.share < 1]
        else:
            lines.append("nothing was changed: no share of the change brings every kind of text nearer to the original")
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
    weights: Mapping[str, float] | None = None,
    held_out: float = HELD_OUT,
    minutes: float | Mapping[str, float] | None = None,
    block: int = 8192,
    training: Training = Training(),  # noqa: B008 - it is frozen
    distillation: Distillation = Distillation(),  # noqa: B008 - so is this
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Healing:
    """Change the weights of ``model`` so that, under ``plan``, it computes again what it computed without.

    Parameters keep their names, shapes and dtypes; but an attention that becomes linear, and whose output projection
    cannot be that map, leaves for a module that holds it, as :func:`fxfuse.prune` would have it. Nothing is written
    before all is done; an error or an interruption leaves the model as it was. Of what a method changes nothing is kept
    unless it brings the planned model nearer to the original on every kind of text that was held out. From then on the
    model is damaged without the plan. It carries it (:mod:`fxfuse.model.healed`): under no plan, or another, it is
    refused.

    ``"fit"`` needs no gradients: front to back, each linear map by which a branch writes to the residual stream (down
    and output projections, with their biases) is refitted by ridge regression, so that the stream of the planned model
    follows the original's (:mod:`fxfuse.healing.fit`). ``"local"`` trains all weights of one region after the other, by
    gradient descent, to the same end (:mod:`fxfuse.healing.local`). ``"distill"`` trains the planned model as a whole
    to say what the original says (:mod:`fxfuse.healing.course`; :func:`fxfuse.healing.distill.distill` does so in
    stages and in several processes). ``["fit", "local", "distill"]`` goes on from the one to the other: minutes, then
    an hour, then as long as there is text and time.

    Args:
        model: a language model, with all that the plan drops still in it; compiled or not. It runs in eval mode.
        plan: what it will follow, or the path of that.
        batches: keyword arguments of the model's calls, such as ``{"input_ids": [batch, length]}``. Several kinds of
            text guard against a fit that helps one and hurts another: give ``{"code": ..., "prose": ...}``. Positions
            where ``attention_mask`` is 0 do not count. ``"self"``, alone or as a kind, is 16,384 tokens that the model
            writes itself (:func:`fxfuse.data.own_text.written_by` writes more).
        method: how, or several, each going on from the one before.
        weights: how much a token of each kind of text counts, as in ``{"code": 2, "prose": 1}``: in the sums of the
            fit, in the losses, and where it is chosen what is kept. None: all count alike.
        held_out: share of the batches of each kind that is not fitted to, but chooses and decides. The first 2,048 of
            its tokens judge what a method has made.
        minutes: how long to go on, all methods together, or each as in ``{"fit": 5, "distill": 20}``; steps that are
            not begun by then stay as they are. Judging comes on top. Without a limit "distill" reads the text once.
        block: the most inputs of a map that are solved for at once, which takes ``8 * block ** 2`` bytes a few times
            over. A wider map, as of a group of FFNs, is solved in blocks.
        training: how regions are trained, by "local".
        distillation: how the whole model is, by "distill".
        resume: a folder that keeps what each step gave, and checkpoints; an interrupted run goes on from it. Remove it
            when done.
        progress: show on stderr how far it is.

    Memory, besides: the stream of each batch, twice, and a second copy of the weights that are fitted; while they are
    written a third. Of what the original says to the text that judges up to 2 GiB are kept. "distill" takes a copy of
    what is trained, its gradients and the optimizer's states.

    Raises:
        HealError: too little text; nothing in the model can be fitted; a plan without edits; a state of something else.
        PlanError: the plan does not fit the model, or was applied to it already.
        CaptureError: the model cannot be traced to one graph, or not be run in parts.
        RecordError, NotFiniteError: the model cannot be called with a batch, or computes NaN.
        OptionError: an option out of range.
        MissingDependencyError: what "distill" trains with is not installed.
    """
    started = time.monotonic()
    chosen = Plan.load(plan) if isinstance(plan, str | os.PathLike) else plan
    if spread := spread_weights(model):
        raise HealError(f"{spread}: heal it in one process, or under FSDP by method='distill', before it is sharded")
    own = original(model)
    methods = _checked(chosen, method)
    check_count("block", block)
    _check_minutes(minutes, methods)
    if "distill" in methods:
        distillation.check(resume is not None)
    if healed_for(own) is not None:
        raise HealError("the model was healed already, so it is no longer the original: load that again")
    text = kinds(batches, held_out, lambda: written_by(own, OWN_TOKENS, progress=progress), weights)
    both = mapped(own, chosen, text[0].fitted[0])
    patient = Patient(own, both, chosen, text)
    ways = Ways(block, training, distillation, None if resume is None else Path(resume), progress)
    judge = Judge(own, both.model, chosen, text, progress)
    healed: dict[str, Tensor] = {}
    treated: list[Treated] = []
    verdicts: list[Verdict] = []
    for name in methods:
        made = treat(patient, name, ways, healed, _until(minutes, name, started))
        change = Change(both.model, healed, made.weights, made.anew)
        with eval_mode(own, both.model), uncompiled(own), originals_forbidden():
            verdict, healed = judge(name, change)
        treated.append(made)
        verdicts.append(verdict)
    share = next((verdict.share for verdict in reversed(verdicts) if verdict.share), 0.0)
    if share:
        commit(own, chosen, healed, both)
    outcomes = tuple(outcome for made in treated for outcome in made.outcomes)
    first, last = verdicts[0].kl, verdicts[-1].kl
    return Healing(
        outcomes,
        {name: Divergence(first[name].before, last[name].after) for name in first},
        share,
        outcomes[0].tokens if outcomes else _amounts(text),
        time.monotonic() - started,
        tuple(verdicts),
        next((made.stage for made in treated if made.stage is not None), None),
    )


def _checked(plan: object, method: object) -> list[Method]:
    given = [method] if isinstance(method, str) else list(method) if isinstance(method, list | tuple) else []
    methods = [name for name in given if name in METHODS]
    if not methods or len(methods) < len(given):
        raise OptionError(f"method={method!r}: choose of {', '.join(METHODS)}, or give a list of them")
    if len(set(methods)) < len(methods):
        raise OptionError(f"method={method!r} names one twice")
    if not isinstance(plan, Plan):
        raise OptionError(f"plan is a fxfuse.Plan or the path of one, not {plan!r}")
    if not plan:
        raise HealError("the plan is empty: it costs nothing, so there is nothing to heal")
    return methods


def _check_minutes(minutes: object, methods: Sequence[Method]) -> None:
    for name, limit in minutes.items() if isinstance(minutes, Mapping) else [("", minutes)]:
        check_bound(f"minutes[{name!r}]" if name else "minutes", limit, "a time")
        if name and name not in methods:
            raise OptionError(f"minutes has {name!r}, which is none of the methods: {', '.join(methods)}")


def _until(minutes: float | Mapping[str, float] | None, method: Method, started: float) -> float:
    """When a method that begins now is to end."""
    if isinstance(minutes, Mapping):
        return time.monotonic() + 60 * minutes[method] if method in minutes else math.inf
    return math.inf if minutes is None else started + 60 * minutes


def _amounts(text: Sequence[Kind]) -> tuple[int, int]:
    """How many tokens are trained on, and held out."""
    fitted, held = (sum(count_tokens(batch) for kind in text for batch in kind.part(held)) for held in (False, True))
    return fitted, held
