"""What the original model says of a batch: live, or its likeliest tokens, kept on disk."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfuse._common.files import write_atomically
from fxfuse._common.sealed import seal, unseal
from fxfuse.data.batches import Batch, call, eval_mode, fresh, logits_of
from fxfuse.errors import HealError
from fxfuse.healing.stages import WEIGHT
from fxfuse.measure.resume import digest_batch
from fxfuse.model.force import uncompiled

FORMAT = "fxfuse-teacher-1"

LIKELIEST, TOKENS = "fxfuse_log_probabilities", "fxfuse_tokens"
"""Keys of a batch under which it carries what the teacher said of it."""


class Tap:
    """A forward pre-hook that keeps what a module is given: the hidden states ``[batch, length, d]`` of a head."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self.value = args[0]

    def take(self) -> Tensor:
        """What was kept, which is kept no longer."""
        taken, self.value = self.value, None
        assert taken is not None  # the head was found by calling the model in the same way
        return taken


def arguments(model: nn.Module, batch: Batch) -> dict[str, object]:
    """The arguments of a training's call: no labels, and no KV cache unless the batch asks for one."""
    made = {name: value for name, value in batch.items() if name not in ("labels", LIKELIEST, TOKENS, WEIGHT)}
    takes = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False, **made} if takes else made


@torch.no_grad()
def logits_now(model: nn.Module, number: int, batch: Batch) -> Tensor:
    """The original's logits ``[batch, length, vocabulary]``.

    Raises:
        HealError: it returns none.
        RecordError: it cannot be called with the ``number``-th batch.
    """
    with uncompiled(model):
        return checked(call(model, number, fresh(arguments(model, batch))), batch)


def checked(output: object, batch: Batch) -> Tensor:
    """The logits in what a model returned, a row for each token of ``batch``."""
    logits, ids = logits_of(output), batch["input_ids"]
    assert isinstance(ids, Tensor)
    if logits is None or logits.shape[:-1] != ids.shape:
        raise HealError(
            "the model returns no logits [batch, length, vocabulary], one row for each of the input_ids: let it return "
            "a tensor, or an object with .logits"
        )
    return logits


def head_of(model: nn.Module, batch: Batch) -> str:
    """The path of the module that makes logits of hidden states, seen in one call; empty if no module does that alone.

    It is the last one that is called with ``[batch, length, d]`` and returns what has the logits' shape.
    """
    seen: list[tuple[str, torch.Size, torch.Size]] = []

    def watch(path: str) -> object:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if len(args) and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen.append((path, args[0].shape, output.shape))

        return hook

    handles = [m.register_forward_hook(watch(path)) for path, m in model.named_modules() if path]
    try:
        with eval_mode(model):
            wanted = logits_now(model, 0, batch).shape
    finally:
        for handle in handles:
            handle.remove()
    fits = [path for path, given, made in seen if made == wanted and len(given) == 3 and given[-1] != made[-1]]
    return fits[-1] if fits else ""


@dataclass(frozen=True)
class TopK:
    """The ``k`` likeliest tokens that a teacher finds, position by position: a file for each batch.

    Attributes:
        folder: that holds the files.
        k: how many tokens; the rest of the vocabulary is one class.
        teacher: digest of its weights.
    """

    folder: Path
    k: int
    teacher: str

    @torch.no_grad()
    def fill(self, model: nn.Module, batches: Iterable[Batch], share: tuple[int, int]) -> Iterable[int]:
        """Ask the teacher of the batches that have no file yet, and yield the number of each batch that has one now.

        Args:
            model: the teacher.
            batches: all of them.
            share: the number of this process, and how many there are: each asks for a part.

        Raises:
            HealError: ``k`` is larger than the vocabulary, or the folder cannot be written.
        """
        own, processes = share
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for number, batch in enumerate(batches):
                if number % processes == own and not self._file(batch).exists():
                    write_atomically(self._file(batch), self._asked(model, number, batch))
                yield number
        except OSError as error:
            raise HealError(f"{str(self.folder)!r} cannot keep what the teacher says: {error.strerror}") from error

    def dress(self, batch: Batch) -> Batch:
        """``batch`` with what the teacher said of it: log-probabilities and tokens, ``[batch, length, k]``.

        Raises:
            HealError: there is no file of it, or that of another teacher, or a damaged one.
        """
        path = self._file(batch)
        try:
            header, said = unseal(path, FORMAT) or ({}, {})
        except (OSError, ValueError) as error:
            raise HealError(
                f"{str(path)!r} cannot be read ({error}): remove it, and the teacher is asked again; the batches must "
                "be the same each time they are read"
            ) from error
        if header != self._header or said.keys() != {LIKELIEST, TOKENS}:
            raise HealError(f"{str(path)!r} holds what another teacher said: remove it, or give another folder")
        return {**batch, **said}

    @property
    def _header(self) -> dict[str, object]:
        return {"teacher": self.teacher, "k": self.k}

    def _file(self, batch: Batch) -> Path:
        return self.folder / f"{digest_batch(batch)}.safetensors"

    def _asked(self, model: nn.Module, number: int, batch: Batch) -> bytes:
        logits = logits_now(model, number, batch)
        if self.k > logits.shape[-1]:
            raise HealError(f"top_k={self.k} is more than the vocabulary of {logits.shape[-1]} tokens")
        kind = torch.promote_types(logits.dtype, torch.float32)
        found = [F.log_softmax(row, -1, dtype=kind).topk(self.k, -1) for row in logits]
        tensors = {
            LIKELIEST: torch.stack([each.values for each in found]).cpu(),
            TOKENS: torch.stack([each.indices for each in found]).to(torch.int32).cpu(),
        }
        return seal(FORMAT, self._header, tensors)
