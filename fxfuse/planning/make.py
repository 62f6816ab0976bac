"""``make_plan``: a recording, a budget, and perhaps the model to measure with; a plan."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from fxfuse._common.bounds import check_bound, check_count
from fxfuse._common.progress import bar
from fxfuse._torch.compiled import original
from fxfuse.data.batches import Batch
from fxfuse.errors import OptionError
from fxfuse.measure.recording import Recording
from fxfuse.plan import Decision, Plan
from fxfuse.planning.budget import Cost, search
from fxfuse.planning.costs import Costs, measure_costs
from fxfuse.planning.decisions import plan_of, propose
from fxfuse.planning.find import Effort, Kinds, find_plan
from fxfuse.planning.groups import Limits
from fxfuse.planning.lead import lead
from fxfuse.planning.meter import Meter
from fxfuse.planning.scores import Score, cheapest, check_score, how_many
from fxfuse.planning.targets import Targets
from fxfuse.planning.text import first_tokens, prompt

CONTEXT = 2048
"""Tokens in the KV cache where costs are measured and nothing else is asked for."""


def make_plan(
    recording: Recording,
    model: nn.Module | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    drop: int | float | None = None,
    score: Score = "kl",
    max_score: float | None = None,
    max_distance: float | None = None,
    max_width: int | None = None,
    keep_last: bool = False,
    max_kl: float | None = None,
    drop_share: float = 0.5,
    max_tokens: int | None = None,
    search_tokens: int | None = None,
    target_latency: float | None = None,
    max_memory: float | None = None,
    max_kv_bytes: float | None = None,
    costs: Costs | None = None,
    heal_on: Kinds | None = None,
    effort: Effort = Effort(),  # noqa: B008 - it is frozen
    minutes: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan:
    """Attentions to drop and FFNs to make parallel, chosen from a recording and, with a model, by measuring.

    With ``target_latency``, ``max_memory`` or ``max_kv_bytes`` it is the best plan that reaches these, which may also
    drop FFNs and make attentions linear: see :func:`fxfuse.planning.find_plan`, which returns all that was tried. The
    options from ``target_latency`` on, ``max_kl`` and ``max_tokens`` are for that; the others are not. Without
    ``model``, but with ``costs``, it is what the recorded KLs and distances predict.

    Without ``model`` the plan is what the recording proposes. Mean distances cannot see a group that ruins only a few
    tokens, so such a plan is a lead. With ``model`` and ``batches`` each edit is tried, drops first, and kept if what
    it adds to the measured KL of the plan so far is within its share of ``max_kl``. A group of FFNs has that part of
    what is left which the FFN steps it saves are of those that all groups not yet decided would save; one that costs
    more is split in two. See :func:`fxfuse.planning.search`.

    Args:
        recording: of the model. The plan that it was made under is a part of the plan made here.
        model: the recorded model, with the same weights. It is left as it is, compiled or not.
        batches: what to measure on: keyword arguments of the model's calls, as for :func:`fxfuse.evaluate`.
        drop: attentions to drop: how many (3), or what fraction of them (0.25). With a model at most so many, and by
            default as many as fit. Without one, by default none, or as many as ``max_score`` allows.
        score: what makes an attention cheap: "kl", "cosine" or "norm_ratio", see :mod:`fxfuse.planning.scores`.
        max_score: what the scores of the dropped ones may add up to.
        max_distance: the largest recorded mean distance (cosine, 0..2) between two FFNs of a group.
        max_width: the most hidden units of a group together.
        keep_last: leave the last FFN of each attention-free run alone, as arXiv 2503.18908 does.
        max_kl: KL(original || planned), nats per token, that the whole plan may cost; needed with a model.
        drop_share: the part of ``max_kl`` that the drops may take, 0..1.
        max_tokens: measure on so many predicted tokens, not on all of ``batches``.
        search_tokens: compare edits on so many tokens only; the plan that comes out is measured on all of them.
        target_latency: the time of a call, as a share of the original's.
        max_memory: bytes of weights and KV cache, at the batch and context of the costs.
        max_kv_bytes: bytes of KV cache, at these.
        costs: of the branches, measured by :func:`fxfuse.planning.measure_costs` or modelled. If None they are measured
            here: a decode step of one sequence, after 2,048 tokens of ``batches``.
        heal_on: text to heal the best plans on before the choice is made, see :func:`fxfuse.heal`.
        effort: how long to look, see :class:`fxfuse.planning.Effort`.
        minutes: after which no edit is exchanged for another any more; what comes before is always done.
        resume: a file that keeps what was measured; an interrupted search goes on from it.
        progress: show on stderr how far it is.

    Raises:
        OptionError: an option out of range, or a model without batches or budget, or these without it; or no plan
            reaches the targets: the message names the tightest, and how far off it is.
        RecordError: the recording is of another model or lacks the score, or the model cannot be evaluated.
        PlanError: the plan that the recording was made under costs more than ``max_kl`` by itself.
    """
    targets = Targets(latency=target_latency, memory=max_memory, kv_bytes=max_kv_bytes, kl=max_kl)
    if targets:
        if (model is None) != (batches is None):
            raise OptionError("a plan is measured with a model and batches: give both, or neither")
        look = effort if minutes is None else replace(effort, minutes=minutes)
        if model is None or batches is None:
            if max_kl is not None:
                raise OptionError("max_kl is measured: give model and batches")
            if costs is None:
                raise OptionError("what a plan saves is measured: give costs, or model and batches")
            return lead(recording, targets, costs, look.max_group)
        recording.check(original(model))  # before minutes go into measuring
        given = first_tokens(batches, max_tokens)
        known = measure_costs(model, prompt(given, CONTEXT), progress=progress) if costs is None else costs
        found = find_plan(
            recording, model, given, targets, known, heal_on=heal_on, effort=look, resume=resume, progress=progress
        )
        return found.plan
    choices = Choices(
        drop=drop,
        score=score,
        max_score=max_score,
        limits=Limits(max_distance=max_distance, max_width=max_width, keep_last=keep_last),
        max_kl=max_kl,
        drop_share=drop_share,
        max_tokens=max_tokens,
        search_tokens=search_tokens,
    )
    return plan_of(recording, decide(recording, choices, model, batches, progress))


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The options of :func:`make_plan`, which explains them.

    Raises:
        OptionError: one is out of range.
    """

    drop: int | float | None = None
    score: Score = "kl"
    max_score: float | None = None
    limits: Limits = field(default_factory=Limits)
    max_kl: float | None = None
    drop_share: float = 0.5
    max_tokens: int | None = None
    search_tokens: int | None = None

    def __post_init__(self) -> None:
        check_score(self.score)
        check_bound("max_kl", self.max_kl, "a budget in nats per token")
        check_bound("max_score", self.max_score, "what the scores may add up to")
        check_bound("drop_share", self.drop_share, "a part of max_kl, 0..1")
        if self.drop_share > 1:
            raise OptionError(f"drop_share is a part of max_kl, 0..1, not {self.drop_share}")
        check_count("max_tokens", self.max_tokens)
        check_count("search_tokens", self.search_tokens)


def decide(
    recording: Recording,
    choices: Choices,
    model: nn.Module | None = None,
    batches: Iterable[Batch] | None = None,
    progress: bool = False,
) -> list[Decision]:
    """What :func:`make_plan` decides, edit by edit, with what was measured and why; the plan is what was kept."""
    if (model is None) != (batches is None):
        raise OptionError("a plan is measured with a model and batches: give both, or neither")
    if model is None or batches is None:
        if choices.max_kl is not None:
            raise OptionError("max_kl is measured: give model and batches. max_score is what a recording can tell")
        drop = 0 if choices.drop is None and choices.max_score is None else choices.drop
        return propose(recording, cheapest(recording, drop, choices.score, choices.max_score), choices.limits)
    if choices.max_kl is None:
        raise OptionError("give max_kl: how many nats per token the plan may cost (0.05, say)")
    recording.check(original(model))
    count = how_many(recording, choices.drop)
    meter = Meter(model, batches, choices.max_tokens, choices.search_tokens, progress)
    with bar("planning", "plans measured", None, progress) as advance:

        def measured(cost: Cost, plan: Plan) -> float:
            kl = cost(plan)
            advance(1)
            return kl

        return search(
            recording,
            cheapest(recording, None if count else 0, choices.score, choices.max_score),
            choices.limits,
            partial(measured, meter),
            choices.max_kl,
            count=count,
            drop_share=choices.drop_share,
            final=partial(measured, meter.final),
        )
