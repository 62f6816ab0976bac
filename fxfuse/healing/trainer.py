"""Hugging Face's Trainer with a distillation's loss: several devices, checkpoints, logging and evaluation are its own.

The only module that imports transformers, which is optional.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fxfuse.data.batches import Batch, blaming
from fxfuse.errors import NotFiniteError
from fxfuse.healing.loss import completed, divergence, live, targets
from fxfuse.healing.stages import count_tokens, only, weight_of
from fxfuse.healing.student import bare
from fxfuse.healing.teacher import LIKELIEST, TOKENS, Tap, arguments, checked, logits_now
from fxfuse.measure.divergence import cosine_distance
from fxfuse.measure.evaluation import IGNORED


@dataclass(frozen=True)
class Weights:
    """Of the terms of the loss, each a mean over the tokens that count.

    Attributes:
        cosine: of ``1 - cos`` of the hidden states that the head reads; KL has weight 1.
        lm: of the language model's own loss.
    """

    cosine: float
    lm: float


class Distiller(Trainer):  # type: ignore[misc]  # transformers' own annotations are not read
    """Trains a student whose calls follow a plan to say what ``teacher`` says.

    Args:
        teacher: the original, in eval mode; it is not trained.
        head: path of the module in both whose inputs are compared; empty if none is.
        weights: of the loss.
    """

    loss_is_scaled_for_ga = True  # it is divided by the tokens of the whole step

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        head: str,
        weights: Weights,
        args: TrainingArguments,
        text: Dataset[Batch],
        evaluation: Dataset[Batch] | None,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        super().__init__(
            student, args, only, train_dataset=text, eval_dataset=evaluation, callbacks=[*callbacks, Finite()]
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # older Trainers ask this where this one asks `loss_is_scaled_for_ga`
        self._teacher, self._weights = teacher, weights
        self._taps = (Tap(), Tap()) if head else None
        self._head = head

    def train(self, *args: object, **kwargs: object) -> object:
        """As the Trainer's; the heads are listened to while it lasts."""
        handles = []
        if self._taps is not None:
            for model, tap in zip((bare(self.model), self._teacher), self._taps, strict=True):
                handles.append(model.get_submodule(self._head).register_forward_pre_hook(tap))
        try:
            return super().train(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The batches of a step, and how many tokens count in those of all processes, each as often as it does."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor([sum((weight_of(batch) * count_tokens(batch) for batch in samples), 0.0)], device=device)
        return samples, self.accelerator.gather(count).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, object],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        """The loss of one batch: its part of the mean over the tokens of the step, times the number of processes."""
        wanted = targets(inputs)
        with self.accelerator.autocast():
            known = None if LIKELIEST in inputs else logits_now(self._teacher, 0, inputs)
            with blaming(self.state.global_step, inputs):
                output = model(**arguments(bare(self.model), inputs))
        logits = checked(output, inputs).flatten(0, -2)
        wanted = wanted.to(logits.device)
        if known is None:
            likeliest, tokens = inputs[LIKELIEST], inputs[TOKENS]
            assert isinstance(likeliest, Tensor) and isinstance(tokens, Tensor)
            target, room = completed(likeliest.flatten(0, -2), tokens.flatten(0, -2)), None
        else:
            known = known.flatten(0, -2)
            target = live(known)
            room = known if (known.shape, known.dtype) == (logits.shape, logits.dtype) else None
        loss, _ = divergence(logits, target, wanted.flatten(), self._weights.lm, room)
        if self._taps is not None:
            counted = wanted != IGNORED
            own, others = (tap.take()[counted] for tap in self._taps)
            kind = torch.promote_types(own.dtype, torch.float32)
            loss = loss + self._weights.cosine * cosine_distance(own.to(kind), others.to(kind)).sum()
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes
        weight = weight_of(inputs)
        items = weight * (wanted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = weight * loss * processes / torch.where(items > 0, items, 1)
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, object],
        prediction_loss_only: bool,
        ignore_keys: Sequence[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch of the evaluation."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        assert isinstance(loss, Tensor)
        return loss, None, None


class Finite(TrainerCallback):  # type: ignore[misc]
    """Ends a training whose loss is no number."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **_: object,
    ) -> None:
        """Look at what is logged, which is the same in all processes."""
        loss = logs.get("loss", 0.0)
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss is {loss} at step {state.global_step}: try a smaller lr, or float32. The model is as it was"
            )


class Clock(TrainerCallback):  # type: ignore[misc]
    """Counts steps, and ends a training after some minutes, in all processes at once."""

    def __init__(self, minutes: float | None, advance: Callable[[int], None]) -> None:
        self._seconds = None if minutes is None else 60 * minutes
        self._advance = advance
        self._began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        """Look at the clock of the main process."""
        self._advance(1)
        if self._seconds is not None:
            late = torch.tensor([time.monotonic() - self._began >= self._seconds], device=args.device)
            if bool(broadcast(late)):
                control.should_training_stop = True
        return control
