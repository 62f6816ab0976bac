"""Distill: train the planned model to say what the original says, with gradients, through Hugging Face's Trainer.

The loss is that of Puzzle's global knowledge distillation (GKD, arXiv 2411.19146): KL(original || planned) of the
next-token distributions and the cosine distance of hidden states, here of those that the head reads.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxfuse._common.bounds import check_bound, check_count
from fxfuse._torch.compiled import original
from fxfuse.data.batches import Batch, on_device_of
from fxfuse.errors import HealError, MissingDependencyError, NotFiniteError, OptionError
from fxfuse.healing.choice import Train, choose
from fxfuse.healing.stages import Stage as Stage
from fxfuse.healing.stages import look
from fxfuse.healing.student import student_of, under, values_of, with_adapters
from fxfuse.healing.teacher import arguments, head_of
from fxfuse.healing.training import Lesson, StageRun, agreed, ask, same_run, trainer_arguments
from fxfuse.measure.evaluation import evaluate
from fxfuse.model.force import uncompiled, watch_of
from fxfuse.model.healed import healed_for, mark_healed
from fxfuse.model.stand_ins import is_dropped, is_linear
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
        for number, run in enumerate(self.stages):
            course = f", loss {run.losses[0]:.4g} to {run.losses[-1]:.4g}" if run.losses else ""
            lines.append(f"stage {number}: {run.steps:,} steps{course}")
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
    _check_installed()
    _check_plan(own, chosen)
    _check_options(lr, cosine, lm, top_k, folder)
    parts = _stages(batches, stages, steps, tokens, minutes)
    texts = [look(number, stage) for number, stage in enumerate(parts)]
    with ExitStack() as stack:
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        runs = [
            trainer_arguments(number, stage, text, lr, place / f"stage-{number}", folder is not None, trainer)
            for number, (stage, text) in enumerate(zip(parts, texts, strict=True))
        ]
        stack.enter_context(_teaching(own, runs[0].device))
        trained = choose(own, chosen, on_device_of(own, arguments(own, texts[0].first)), train)
        head = "" if cosine == 0 or top_k is not None else head_of(own, texts[0].first)
        if cosine and not head:
            raise HealError(f"cosine={cosine}: no module makes logits of hidden states alone, so none can be compared")
        if folder is not None:
            same_run(place, own, chosen, texts, runs, [train, cosine, lm, top_k, dict(lora or {})])
        said = None if top_k is None else ask(own, texts, top_k, place, runs[0], progress)
        student = student_of(own, () if train == "lora" else trained)
        if train == "lora":
            student = with_adapters(student, trained, {"r": 16, "lora_alpha": 32, **(lora or {})})
        stack.enter_context(under(student, chosen, inner))
        lesson = Lesson(student, own, head, 1.0 if cosine is None else cosine, lm, said, held_out, callbacks)
        before = _kl(student, own, held_out)
        done = [
            lesson.give(number, text, run, stage.minutes, folder is not None, progress)
            for number, (stage, text, run) in enumerate(zip(parts, texts, runs, strict=True))
        ]
        values = values_of(student, trained)
        _check_finite(values)
        after = _kl(student, own, held_out)
        kl = None if before is None or after is None else (before, after)
        kept = kl is None or agreed(kl[1] < kl[0])
        if kept:
            _write(own, values)
            mark_healed(own, chosen)
    return Distilled(tuple(done), trained, head, kl, kept, time.monotonic() - started)


def _check_installed() -> None:
    for package in ("transformers", "accelerate"):
        if find_spec(package) is None:
            raise MissingDependencyError(f"{package} trains the model: pip install 'fxfuse[heal]'")


def _check_plan(model: nn.Module, plan: object) -> None:
    if not isinstance(plan, Plan):
        raise OptionError(f"plan is a fxfuse.Plan or the path of one, not {plan!r}")
    if not plan:
        raise HealError("the plan is empty: it costs nothing, so there is nothing to heal")
    if healed_for(model) is not None:
        raise HealError("the model was healed already, so it is no longer the original: load that again")
    if watch_of(model) is not None or any(is_dropped(module) or is_linear(module) for module in model.modules()):
        raise HealError("a plan was applied to the model, so it cannot say what it said without: give the original")


def _check_options(
    lr: float, cosine: float | None, lm: float, top_k: int | None, folder: str | os.PathLike[str] | None
) -> None:
    check_bound("lr", lr, "a learning rate")
    check_bound("cosine", cosine, "a weight")
    check_bound("lm", lm, "a weight")
    check_count("top_k", top_k)
    if top_k is not None and folder is None:
        raise OptionError("top_k needs a folder, to keep there what the teacher says")
    if top_k is not None and cosine:
        raise OptionError(
            f"cosine={cosine} needs the teacher's hidden states, which top_k does not keep: leave one out"
        )


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


@contextmanager
def _teaching(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in eval mode, and on the device that trains; afterwards as and where it was."""
    modes = [(module, module.training) for module in model.modules()]
    places = {parameter.device for parameter in model.parameters()}
    try:
        model.eval()
        if len(places) == 1:
            model.to(device)
        yield
    finally:
        if len(places) == 1:
            model.to(places.pop())
        for module, mode in modes:
            module.training = mode


def _kl(student: nn.Module, teacher: nn.Module, held_out: Sequence[Batch] | None) -> float | None:
    """KL(teacher || student) on text held out, nats per token."""
    if held_out is None:
        return None

    def original(**batch: object) -> object:
        with uncompiled(teacher):
            return teacher(**on_device_of(teacher, batch))

    labels = [{"labels": batch["labels"]} if "labels" in batch else {} for batch in held_out]
    batches = [{**arguments(teacher, batch), **own} for batch, own in zip(held_out, labels, strict=True)]
    return evaluate(student, batches, reference=original).kl


def _check_finite(values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise NotFiniteError(f"{name} is no number after the training: try a smaller lr. The model is as it was")


@torch.no_grad()
def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)
