"""A course: a copy of a model, under its plan, learns in stages to say what the model says. Nothing is written into it.

What ``distill`` and the method ``"distill"`` of ``heal`` have in common.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxfuse._common.bounds import check_bound, check_count
from fxfuse.data.batches import Batch, on_device_of
from fxfuse.errors import HealError, MissingDependencyError, NotFiniteError, OptionError
from fxfuse.healing.choice import Train, choose
from fxfuse.healing.mapped import Mapped, mapped
from fxfuse.healing.stages import Stage, look
from fxfuse.healing.student import student_of, under, values_of, with_adapters
from fxfuse.healing.teacher import arguments, head_of
from fxfuse.healing.training import Lesson, StageRun, ask, same_run, trainer_arguments
from fxfuse.measure.evaluation import evaluate
from fxfuse.measure.resume import digest_batch
from fxfuse.model.force import uncompiled, watch_of
from fxfuse.model.stand_ins import is_dropped, is_linear
from fxfuse.plan import Plan

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class Distillation:
    """How a planned model is trained as a whole; :func:`fxfuse.healing.distill.distill` says more of each.

    Attributes:
        train: which parameters: "edited", "ffn", "all" or "lora".
        steps: of the optimizer, at most; None is one pass over the text, or until the time is over if there is a limit.
        lr: learning rate.
        cosine: weight of the hidden states' distance; None is 1 where the model lets them be seen, and 0 elsewhere.
        lm: weight of the language model's own loss.
        top_k: how many of the teacher's likeliest tokens are kept on disk in place of asking it live.
        lora: settings of ``peft.LoraConfig``.
        inner: what compiles the student: "inductor", or "eager" to run it uncompiled.
        trainer: further arguments of ``transformers.TrainingArguments``.
    """

    train: Train = "edited"
    steps: int | None = None
    lr: float = 1e-4
    cosine: float | None = None
    lm: float = 0.0
    top_k: int | None = None
    lora: Mapping[str, object] = field(default_factory=dict)
    inner: str = "inductor"
    trainer: Mapping[str, object] = field(default_factory=dict)

    def check(self, folder: bool) -> None:
        """Look at the options, before there is a long way behind; ``folder`` tells whether one is given.

        Raises:
            MissingDependencyError: transformers or accelerate is not installed.
            OptionError: an option out of range.
        """
        for package in ("transformers", "accelerate"):
            if find_spec(package) is None:
                raise MissingDependencyError(f"{package} trains the model: pip install 'fxfuse[heal]'")
        check_bound("lr", self.lr, "a learning rate")
        check_bound("cosine", self.cosine, "a weight")
        check_bound("lm", self.lm, "a weight")
        check_count("steps", self.steps)
        check_count("top_k", self.top_k)
        if self.top_k is not None and not folder:
            raise OptionError("top_k needs a folder, to keep there what the teacher says")
        if self.top_k is not None and self.cosine:
            raise OptionError(
                f"cosine={self.cosine} needs the teacher's hidden states, which top_k does not keep: leave one out"
            )
        from transformers import TrainingArguments

        if unknown := self.trainer.keys() - inspect.signature(TrainingArguments).parameters:
            raise OptionError(f"the Trainer has no {min(unknown)!r} among its arguments")


@dataclass(frozen=True)
class Learnt:
    """What a student has learnt.

    Attributes:
        stages: what became of each.
        values: of the parameters that were trained, by their names in the model.
        head: the module whose inputs were compared by cosine; empty if that term was left out.
        kl: KL(original || planned) on the text held out before and after, nats per token; None without such text.
        mapped: the model that was trained a copy of.
    """

    stages: tuple[StageRun, ...]
    values: Mapping[str, Tensor]
    head: str
    kl: tuple[float, float] | None
    mapped: Mapped


def learn(
    teacher: nn.Module,
    planned: Mapped | None,
    plan: Plan,
    stages: Sequence[Stage],
    how: Distillation,
    *,
    start: Mapping[str, Tensor] | None = None,
    held_out: Sequence[Batch] | None = None,
    folder: Path | None = None,
    of: str = "",
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = False,
) -> Learnt:
    """Train a copy of a model, under ``plan``, to say what the model itself, ``teacher``, says.

    Args:
        teacher: the original. It stays as it is.
        planned: what is copied: the original with the modules that the plan needs; None to see which these are.
        plan: what the student follows.
        stages: text and budgets.
        how: the other options; see :meth:`Distillation.check`.
        start: values that the student begins with in place of the model's own, by name.
        held_out: batches to measure by, before and after.
        folder: keeps checkpoints, from which a call with the same arguments goes on.
        of: a digest of what else these must be the same in.
        callbacks: of the Trainer.
        progress: show on stderr how far it is.

    Raises:
        HealError, PlanError, NotFiniteError, OptionError, CaptureError, RecordError, MissingDependencyError: as
            :func:`fxfuse.healing.distill.distill` says.
    """
    if watch_of(teacher) is not None or any(is_dropped(module) or is_linear(module) for module in teacher.modules()):
        raise HealError("a plan was applied to the model, so it cannot say what it said without: give the original")
    start = start or {}
    texts = [look(number, stage) for number, stage in enumerate(stages)]
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = [
            trainer_arguments(number, stage, text, how.lr, place / f"stage-{number}", folder is not None, how.trainer)
            for number, (stage, text) in enumerate(zip(stages, texts, strict=True))
        ]
        stack.enter_context(_teaching(teacher, runs[0].device))
        example = on_device_of(teacher, arguments(teacher, texts[0].first))
        planned = planned or mapped(teacher, plan, example)
        trained = choose(planned.model, plan, on_device_of(planned.model, example), how.train)
        head = "" if how.cosine == 0 or how.top_k is not None else head_of(teacher, texts[0].first)
        if how.cosine and not head:
            raise HealError(f"cosine={how.cosine}: no module makes logits of hidden states alone to compare")
        if folder is not None:
            begun = f"{of} from {digest_batch(start)}" if start or of else ""
            settings = [how.train, how.cosine, how.lm, how.top_k, dict(how.lora)]
            same_run(place, teacher, plan, texts, runs, settings, begun)
        said = None if how.top_k is None else ask(teacher, texts, how.top_k, place, runs[0], progress)
        adapted = how.train == "lora"
        student = student_of(planned.model, () if adapted else trained, start)
        if adapted:
            student = with_adapters(student, trained, {"r": 16, "lora_alpha": 32, **how.lora})
        stack.enter_context(under(student, plan, how.inner))
        cosine = 1.0 if how.cosine is None else how.cosine
        lesson = Lesson(student, teacher, head, cosine, how.lm, said, held_out, callbacks)
        before = _kl(student, teacher, held_out)
        done = [
            lesson.give(number, text, run, stage.minutes, folder is not None, progress)
            for number, (stage, text, run) in enumerate(zip(stages, texts, runs, strict=True))
        ]
        values = values_of(student, trained)
        _check_finite(values)
        after = _kl(student, teacher, held_out)
    kl = None if before is None or after is None else (before, after)
    return Learnt(tuple(done), values, head, kl, planned)


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
