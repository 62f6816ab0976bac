"""What healing has found so far, as a folder of files, so that an interruption loses one sum of the stream at most."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from fxfuse._common.files import write_atomically
from fxfuse._common.sealed import seal, unseal
from fxfuse._common.typed import typed
from fxfuse.errors import FxfuseError, HealError
from fxfuse.healing.steps import Outcome
from fxfuse.healing.text import Kind
from fxfuse.measure.recording import model_digest
from fxfuse.measure.resume import digest_batch
from fxfuse.plan import Plan

FORMAT = "fxfuse-heal-state-1"


class State:
    """The folder ``path``: a file for each step of the healing of a model under a plan, by one method, on certain text.

    Attributes:
        outcomes, weights: of each step that is done, what became of it and its new parameters.

    Raises:
        HealError: a file is damaged, or the state of another healing.
        FxfuseError: the folder cannot be made.
    """

    def __init__(
        self, path: str | os.PathLike[str], model: nn.Module, plan: Plan, text: Sequence[Kind], settings: str
    ) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FxfuseError(f"{str(path)!r} cannot be made a folder: {error.strerror}") from error
        digest, model_ = digest_text(text), model_digest(model)
        self._of = {
            "model": model_,
            "plan": plan.model_dump_json(exclude=None if plan.narrow else {"narrow"}),
            "text": digest,
            "method": settings,
        }
        self.outcomes: list[Outcome] = []
        self.weights: list[dict[str, Tensor]] = []
        while (file := self._file(len(self.outcomes))).exists():
            self._load(file)

    def add(self, weights: Mapping[str, Tensor], outcome: Outcome) -> None:
        """Write down one more step.

        Raises:
            OSError: it could not be written; the steps before are untouched.
        """
        header = {**self._of, "outcome": asdict(outcome)}
        write_atomically(self._file(len(self.outcomes)), seal(FORMAT, header, weights))
        self.outcomes.append(outcome)
        self.weights.append(dict(weights))

    def _file(self, step: int) -> Path:
        return self.path / f"step-{step:04}.safetensors"

    def _load(self, path: Path) -> None:
        again = f"remove {str(self.path)!r} to heal from the start, or give another folder"
        try:
            if (found := unseal(path, FORMAT)) is None:
                raise HealError(f"{str(path)!r} is no state of a healing: give another folder")
            header, weights = found
            for what, own in self._of.items():
                if header[what] != own:
                    raise HealError(f"{str(path)!r} is the state of a healing with another {what}: {again}")
            outcome = typed(Outcome, header["outcome"], "outcome")
        except (OSError, KeyError, ValueError) as error:
            raise HealError(f"the state {str(path)!r} cannot be read ({error}): {again}") from error
        self.outcomes.append(outcome)
        self.weights.append(weights)


def digest_text(text: Sequence[Kind]) -> str:
    """What tells one text from another: kinds, how much they count, their batches and which of these are held out."""
    digest = hashlib.sha256()
    for kind in text:
        for part in (kind.fitted, kind.held):
            digest.update(f"{kind.name} {kind.weight} {len(part)}".encode())
            for batch in part:
                digest.update(digest_batch(batch).encode())
    return digest.hexdigest()
