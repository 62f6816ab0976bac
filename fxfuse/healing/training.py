"""One stage of a distillation: what the Trainer is told, what it goes on from, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fxfuse._common.files import write_atomically
from fxfuse._common.progress import bar
from fxfuse._common.sealed import seal, unseal
from fxfuse._common.typed import typed
from fxfuse.data.batches import Batch
from fxfuse.errors import HealError, OptionError
from fxfuse.healing.stages import FOREVER, Stage, Text, dataset, steps_of
from fxfuse.healing.student import whole
from fxfuse.healing.teacher import TopK
from fxfuse.measure.recording import model_digest
from fxfuse.measure.resume import digest_batch
from fxfuse.plan import Plan

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

FORMAT = "fxfuse-distilled-stage-1"

_OURS = {
    "output_dir": "folder",
    "max_steps": "steps",
    "num_train_epochs": "steps, tokens or minutes",
    "learning_rate": "lr",
    "per_device_train_batch_size": "batches of that size",
    "per_device_eval_batch_size": "batches of that size",
    "resume_from_checkpoint": "folder",
    "remove_unused_columns": "batches of what the model takes",
}
"""Arguments of the Trainer that are given otherwise here."""


@dataclass(frozen=True)
class StageRun:
    """What became of one stage.

    Attributes:
        steps: of the optimizer.
        losses: as the Trainer logged them, one a step unless ``logging_steps`` says otherwise, with those before an
            interruption.
    """

    steps: int
    losses: tuple[float, ...]

    def __str__(self) -> str:
        """As in ``120 steps, loss 0.51 to 0.32``."""
        return f"{self.steps:,} steps" + (
            f", loss {self.losses[0]:.4g} to {self.losses[-1]:.4g}" if self.losses else ""
        )


def trainer_arguments(
    number: int, stage: Stage, text: Text, lr: float, folder: Path, keep: bool, given: Mapping[str, object]
) -> TrainingArguments:
    """What the Trainer is told of the ``number``-th stage.

    Raises:
        OptionError: something that it does not know, or that is given otherwise.
        HealError: the text is too short for one step.
    """
    from transformers import TrainingArguments

    for name in _OURS.keys() & given:
        raise OptionError(f"{name} is not given to the Trainer: give {_OURS[name]}")
    settings: dict[str, object] = {
        "weight_decay": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "save_total_limit": 2,
        "accelerator_config": {"dispatch_batches": False, "split_batches": False},
        **given,
        "output_dir": str(folder),
        "learning_rate": lr if stage.lr is None else stage.lr,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "remove_unused_columns": False,
    }
    if settings.get("fsdp"):
        settings["fsdp_config"] = _in_one_unit(settings.get("fsdp_config"))
    try:
        probe = TrainingArguments(**settings)
        steps = steps_of(number, stage, text, probe.gradient_accumulation_steps * probe.world_size)
        timed = steps == FOREVER
        settings = {
            "lr_scheduler_type": "constant_with_warmup" if timed else "cosine",
            "warmup_steps": 10 if timed else -(-steps // 20),
            "save_strategy": "steps" if keep else "no",
            "save_steps": 50 if timed else max(1, min(100, steps // 10)),
            **settings,
            "max_steps": steps,
        }
        made = TrainingArguments(**settings)
    except (TypeError, ValueError) as error:
        raise OptionError(f"the Trainer refuses its arguments: {error}") from error
    if made.fsdp and made.world_size == 1:
        raise OptionError("fsdp shards over several processes, and there is one: start more, as by torchrun")
    if made.n_gpu > 1:
        made._n_gpu = 1  # nn.DataParallel would split batches; several GPUs are several processes
    return made


def _in_one_unit(config: object) -> object:
    """FSDP's settings, with the model as its one unit unless they choose another: where a unit begins, a graph ends."""
    if config is not None and not isinstance(config, Mapping):
        return config  # the path of a file
    given = {str(key).removeprefix("fsdp_"): value for key, value in (config or {}).items()}
    chosen = given.keys() & {"auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"}
    return given if chosen else {**given, "auto_wrap_policy": "NO_WRAP"}


def same_run(
    folder: Path,
    model: nn.Module,
    plan: Plan,
    texts: Sequence[Text],
    runs: Sequence[TrainingArguments],
    settings: Sequence[object],
    begun: str = "",
) -> None:
    """See that ``folder`` is new, or was begun by a call with the same arguments, and from the same state, ``begun``.

    Raises:
        HealError: it belongs to another run, or cannot be written.
    """
    own = {
        "model": model_digest(model),
        "plan": json.loads(plan.to_json()),
        "text": [[digest_batch(text.first), text.count] for text in texts],
        "stages": [[run.max_steps, run.gradient_accumulation_steps, run.world_size, run.learning_rate] for run in runs],
        "settings": settings,
        "start": begun,
    }
    own = json.loads(json.dumps(own, default=str))
    path = folder / "run.json"
    try:
        known: object = json.loads(path.read_text()) if path.exists() else None
        if not isinstance(known, dict | None):
            raise ValueError(f"{path.name} holds a {type(known).__name__}")
        runs[0].distributed_state.wait_for_everyone()
        if known is None and runs[0].process_index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(own, indent=2).encode())
    except (OSError, ValueError, RecursionError) as error:
        raise HealError(f"{str(folder)!r} cannot hold checkpoints ({error}): give another folder") from error
    for what in own:
        if known is not None and known.get(what) != own[what]:
            raise HealError(
                f"{str(folder)!r} is the folder of a run with another {what}: remove it to start anew, or give another"
            )


def ask(model: nn.Module, texts: Sequence[Text], k: int, folder: Path, run: TrainingArguments, progress: bool) -> TopK:
    """Let the teacher say what it finds likeliest in all texts, before anything is trained.

    Raises:
        OptionError: a text can be read but once.
        HealError: see :class:`TopK`.
    """
    said = TopK(folder / "teacher", k, model_digest(model)["weights"])
    for number, text in enumerate(texts):
        if not text.again:
            raise OptionError(f"top_k reads the batches twice, and those of stage {number} can be read but once")
        with bar("asking the teacher", "batches", text.count, progress) as advance:
            for _ in said.fill(model, text.batches, (run.process_index, run.world_size)):
                advance(1)
    run.distributed_state.wait_for_everyone()
    return said


def agreed(value: bool) -> bool:
    """What the first process found, in all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


@dataclass(frozen=True)
class Lesson:
    """Who teaches whom, and what.

    Attributes:
        student: calls of it follow the plan.
        teacher: the original.
        head: see :class:`fxfuse.healing.trainer.Distiller`.
        cosine, lm: weights of the loss.
        said: what the teacher said before; None to ask it live.
        evaluation: what the Trainer evaluates on, where it is told to.
        callbacks: of the Trainer.
    """

    student: nn.Module
    teacher: nn.Module
    head: str
    cosine: float
    lm: float
    said: TopK | None
    evaluation: Sequence[Batch] | None
    callbacks: Sequence[TrainerCallback]

    def give(
        self, number: int, text: Text, run: TrainingArguments, minutes: float | None, keep: bool, progress: bool
    ) -> StageRun:
        """Train the student; with ``keep``, go on from what the stage's folder holds.

        Raises:
            HealError: there was no text for a single step; what the folder holds cannot be read.
            OptionError: FSDP is asked for where accelerate has none.
        """
        from fxfuse.healing.trainer import Clock, Distiller, Weights

        folder = Path(run.output_dir)
        if keep and (folder / "done.safetensors").exists():
            return self._done(folder / "done.safetensors")
        last, steps = _last_checkpoint(folder, run.max_steps) if keep else (None, 0)
        total = None if run.max_steps == FOREVER else run.max_steps
        with bar(f"distilling, stage {number}", "steps", total, progress) as advance:
            advance(steps)
            trainer = Distiller(
                self.student,
                self.teacher,
                self.head,
                Weights(self.cosine, self.lm),
                run,
                dataset(text.batches, _as_it_is if self.said is None else self.said.dress),
                None if self.evaluation is None else dataset(self.evaluation, _as_it_is),
                [*self.callbacks, Clock(minutes, advance)],
            )
            if run.fsdp and not trainer.is_fsdp_enabled:
                raise OptionError(
                    "fsdp: accelerate shards nothing on CPUs, so each process would train all: leave it out"
                )
            trainer.train(resume_from_checkpoint=last)
        if not trainer.state.global_step:
            raise HealError(
                f"stage {number}: the text has ended before one step, which takes "
                f"{run.gradient_accumulation_steps * run.world_size} batches: give more"
            )
        losses = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
        made = StageRun(trainer.state.global_step, losses)
        if keep:
            tensors = self._trained()
            if run.process_index == 0:
                write_atomically(folder / "done.safetensors", seal(FORMAT, asdict(made), tensors))
        return made

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: whole(each) for name, each in self.student.named_parameters() if each.requires_grad}

    @torch.no_grad()
    def _done(self, path: Path) -> StageRun:
        """What a stage that has ended came to; the student gets its weights."""
        try:
            if (found := unseal(path, FORMAT)) is None:
                raise ValueError("it is another file of tensors")
            made = typed(StageRun, found[0])
            trained = {name: each for name, each in self.student.named_parameters() if each.requires_grad}
            shapes = {name: each.shape for name, each in found[1].items()}
            if shapes != {name: each.shape for name, each in trained.items()}:
                raise ValueError("it has other parameters than are trained")
        except (OSError, ValueError) as error:
            raise HealError(f"{str(path)!r} cannot be read ({error}): remove it to train that stage again") from error
        for name, parameter in trained.items():
            parameter.copy_(found[1][name])
        return made


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _last_checkpoint(folder: Path, end: int) -> tuple[str | None, int]:
    """The last checkpoint before the step ``end`` that was written whole, and its step.

    The Trainer's state is what is written last. From the end itself a Trainer would go on, and past it.
    """
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            found.append((int(json.loads((path / "trainer_state.json").read_text())["global_step"]), path))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    before = [each for each in found if each[0] < end]
    if not before:
        return None, 0
    steps, path = max(before)
    return str(path), steps
