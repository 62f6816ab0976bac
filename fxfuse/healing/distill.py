"""Distill: train the planned model to say what the original says, with gradients, through Hugging Face's Trainer.

The loss is that of Puzzle's global knowledge distillation (GKD, arXiv 2411.19146): KL(original || planned) of the
next-token distributions and the cosine distance of hidden states, here of those that the head reads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from fxfuse._torch.compiled import original
from fxfuse.data.batches import Batch
from fxfuse.errors import HealError, OptionError
from fxfuse.healing.choice import Train
from fxfuse.healing.commit import commit
from fxfuse.healing.course import Distillation, learn
from fxfuse.healing.stages import Stage as Stage
from fxfuse.healing.training import StageRun, agreed
from fxfuse.model.healed import healed_for
from fxfuse.plan import Plan

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class Distilled:
    """What :func:`distill` did; ``str()`` says it.

    Attributes:
        stages: one by one.
        trained: the names of the parameters that were.
        head: the module whose inputs were compared by cosine; empty if that term was left out.
        kl: KL(original || planned) on the text held out before and after, nats per token; None without such text.
        kept: whether the model has the new weights. It keeps the old ones if ``kl`` has not fallen.
        seconds: that it took.
    """

    stages: tuple[StageRun, ...]
    trained: tuple[str, ...]
    head: str
    kl: tuple[float, float] | None
    kept: bool
    seconds: float

    def __str__(self) -> str:
        lines = [f"{len(self.trained)} parameters trained, {self.seconds:.0f} s"]
        lines += [f"stage {number}: {run}" for number, run in enumerate(self.stages)]
        lines.append(f"hidden states compared at {self.head}" if self.head else "no hidden states were compared")
        if self.kl is not None:
            lines.append(f"KL to the original on text held out: {self.kl[0]:.4g} to {self.kl[1]:.4g} nats/token")
        if not self.kept:
            lines.append("nothing was changed: the planned model came no nearer to the original")
        return "\n".join(lines)


def distill(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str],
    batches: Iterable[Batch] | None = None,
    *,
    train: Train = "edited",
    stages: Sequence[Stage] = (),
    steps: int | None = None,
    tokens: int | None = None,
    minutes: float | None = None,
    lr: float = 1e-4,
    cosine: float | None = None,
    lm: float = 0.0,
    top_k: int | None = None,
    held_out: Sequence[Batch] | None = None,
    lora: Mapping[str, object] | None = None,
    inner: str = "inductor",
    folder: str | os.PathLike[str] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = False,
    **trainer: object,
) -> Distilled:
    """Train the weights of ``model`` so that, under ``plan``, it says what it says without.

    The student is a copy that owns the trained parameters only; the teacher is ``model`` itself. So nothing is written
    into the model before all is done, an error or an interruption leaves it as it was, and the price in memory is one
    copy of what is trained, its gradients and the optimizer's states. Parameters keep their names, shapes and dtypes.
    Afterwards the model is damaged without the plan, which it carries (:mod:`fxfuse.model.healed`).

    Each batch is one of the Trainer's: give ``gradient_accumulation_steps`` for larger steps. Several processes
    (``torchrun``, ``accelerate launch``) share the batches out. Under FSDP the teacher stands whole on each device,
    unless ``top_k`` spares it.

    Args:
        model: a language model, with all that the plan drops still in it; compiled or not.
        plan: what it will follow, or the path of that.
        batches: keyword arguments of the model's calls, such as ``{"input_ids": [batch, length]}``. Tokens that
            ``attention_mask`` hides or ``labels`` (-100) leave out do not count, as for :func:`fxfuse.evaluate`.
        train: "edited": what the plan edits and the branches next to it; "ffn": all FFNs; "all": all that the planned
            model uses; "lora": adapters at the matrices of all branches, merged into these in the end.
        stages: in place of ``batches`` and a budget: several, each with its own; see :class:`Stage`.
        steps: of the optimizer, at most.
        tokens: to train on, at most, about.
        minutes: that each stage may take.
        lr: learning rate: falling like a cosine to 0, after a twentieth of the steps; constant if only minutes are set.
        cosine: weight of the hidden states' distance; None is 1 where the model lets them be seen, and 0 elsewhere and
            with ``top_k``.
        lm: weight of the language model's own loss.
        top_k: ask the teacher once, before the training, and keep its so many likeliest tokens in ``folder``, 8 bytes
            each; the rest of the vocabulary is one class.
        held_out: batches to judge by: if KL to the original has not fallen on them, the old weights stay. They are what
            the Trainer evaluates on, too.
        lora: settings of ``peft.LoraConfig``; rank 16 and alpha 32 unless they say otherwise.
        inner: what compiles the student: "inductor", or "eager" to run it uncompiled.
        folder: keeps checkpoints. A call with the same arguments goes on from the last one.
        callbacks: of the Trainer.
        progress: show on stderr how far it is.
        trainer: further arguments of ``transformers.TrainingArguments``: ``bf16``, ``fsdp``, ``report_to``, ... Weights
            in bfloat16 are trained in bfloat16, which rounds small steps away: better float32 with ``bf16=True``.

    Raises:
        MissingDependencyError: transformers, accelerate or (for "lora") peft is not installed.
        HealError: too little text; a plan without edits, or already applied; nothing to train; a folder of another run.
        PlanError: the plan does not fit the model.
        NotFiniteError: the loss or a weight is no number.
        OptionError: an option out of range.
        CaptureError, RecordError: the model cannot be called with a batch, or not be traced.
    """
    started = time.monotonic()
    own, chosen = original(model), Plan.load(plan) if isinstance(plan, str | os.PathLike) else plan
    how = Distillation(train, None, lr, cosine, lm, top_k, lora or {}, inner, trainer)
    how.check(folder is not None)
    _check_plan(own, chosen)
    parts = _stages(batches, stages, steps, tokens, minutes)
    place = None if folder is None else Path(folder)
    made = learn(own, None, chosen, parts, how, held_out=held_out, folder=place, callbacks=callbacks, progress=progress)
    kept = made.kl is None or agreed(made.kl[1] < made.kl[0])
    if kept:
        commit(own, chosen, made.values, made.mapped)
    return Distilled(made.stages, tuple(made.values), made.head, made.kl, kept, time.monotonic() - started)


def _check_plan(model: nn.Module, plan: object) -> None:
    if not isinstance(plan, Plan):
        raise OptionError(f"plan is a fxfuse.Plan or the path of one, not {plan!r}")
    if not plan:
        raise HealError("the plan is empty: it costs nothing, so there is nothing to heal")
    if healed_for(model) is not None:
        raise HealError("the model was healed already, so it is no longer the original: load that again")


def _stages(
    batches: Iterable[Batch] | None,
    stages: Sequence[Stage],
    steps: int | None,
    tokens: int | None,
    minutes: float | None,
) -> tuple[Stage, ...]:
    if (batches is None) == (not stages):
        raise OptionError("give either batches, or stages that have their own")
    if batches is not None:
        return (Stage(batches, steps, tokens, minutes),)
    if (steps, tokens, minutes) != (None, None, None):
        raise OptionError("each of the stages has a budget of its own: give steps, tokens and minutes to Stage")
    return tuple(stages)
