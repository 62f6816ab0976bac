"""The state of a search as a file: an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fxfuse._common.files import check_writable, write_atomically
from fxfuse._common.sealed import seal, unseal
from fxfuse._common.typed import typed
from fxfuse.data.batches import Batch
from fxfuse.errors import PlanError, RecordError
from fxfuse.measure.resume import digest_batch
from fxfuse.plan import Plan
from fxfuse.planning.changes import Changes

FORMAT = "fxfuse-search-2"

EVERY = 10.0
"""Seconds between two writes."""


def healed_on(text: Mapping[str, Sequence[Batch]]) -> str:
    """What tells one text to heal on from another; empty if there is none."""
    own = {kind: [digest_batch(batch) for batch in batches] for kind, batches in text.items()}
    return _digest(own) if own else ""


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class State:
    """What was measured so far: the changes of edits, and the KL of plans, unhealed and healed.

    Args:
        path: of the file; None keeps the state in memory alone.
        model: the recording's digest of the model.
        batches: what is measured on.
        text: tells what linear maps were fitted on; measured with others, edits with such maps are forgotten.

    Raises:
        RecordError: the file is damaged, or the state of another search.
        FxfuseError: it could not be written.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, model: Mapping[str, str], batches: Sequence[Batch], text: str
    ) -> None:
        self._path = None if path is None else Path(path)
        self._text = text
        self._of = _digest([dict(model), [digest_batch(batch) for batch in batches]])
        self.changes = Changes.empty()
        self.kl: dict[str, float] = {}
        self._written = time.monotonic()
        if self._path is not None:
            check_writable(self._path)
            if self._path.exists():
                self._load(self._path)

    def _load(self, path: Path) -> None:
        again = "remove it to search from the start, or give another file"
        try:
            if (found := unseal(path, FORMAT)) is None:
                raise ValueError("it is another file of tensors")
            header, vectors = found[0], found[1]["vectors"]
            of, text = typed(str, header["of"], "of"), typed(str, header["text"], "text")
            listed = typed(list[tuple[dict[str, object], float]], header["edits"], "edits")
            edits = {Plan.from_json(json.dumps(edit), source="of an edit"): kl for edit, kl in listed}
            kl = typed(dict[str, float], header["kl"], "kl")
            if len(edits) != len(listed) or vectors.dim() != 2 or len(vectors) != len(edits):
                raise ValueError("its edits are not those of its tensor")
        except (OSError, KeyError, ValueError, PlanError) as error:
            raise RecordError(f"{str(path)!r} is no state of a search ({error}): {again}") from error
        if of != self._of:
            raise RecordError(f"{str(path)!r} is the state of a search with another model, or other text: {again}")
        self.kl = kl
        self._text = self._text or text
        rows = [row for row, edit in enumerate(edits) if not edit.linear or text == self._text]
        known = list(edits.items())
        self.changes = Changes(dict(known[row] for row in rows), vectors[rows]) if rows else Changes.empty()

    def keep_changes(self, changes: Changes) -> None:
        """Note the changes of edits."""
        self.changes = changes
        self._write(EVERY)

    def keep_kl(self, key: str, kl: float) -> None:
        """Note the KL of a plan."""
        self.kl[key] = kl
        self._write(0.0)

    def flush(self) -> None:
        """Write what was not written yet."""
        self._write(0.0)

    def _write(self, every: float) -> None:
        if self._path is None or time.monotonic() - self._written < every:
            return
        edits = [(json.loads(edit.to_json()), kl) for edit, kl in self.changes.kl.items()]
        header = {"of": self._of, "text": self._text, "edits": edits, "kl": self.kl}
        vectors = self.changes.vectors if self.changes.kl else torch.zeros(0, 0, dtype=torch.float16)
        write_atomically(self._path, seal(FORMAT, header, {"vectors": vectors}))
        self._written = time.monotonic()
