"""The state of a recording between two batches, as a file, so that an interruption loses one batch at most."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fxfuse._common.files import check_writable, write_atomically
from fxfuse._common.sealed import seal, unseal
from fxfuse._common.typed import typed
from fxfuse._torch.pytree import tree_leaves
from fxfuse.errors import RecordError
from fxfuse.measure.measurements import Measurements
from fxfuse.measure.recording import BranchRecord
from fxfuse.measure.statistics import Tally

FORMAT = "fxfuse-recording-state-1"

_UNITS = "units"


class State:
    """What ``path`` holds of the recording of a model, made under certain settings.

    Raises:
        RecordError: the file is damaged, or the state of another recording.
        FxfuseError: it could not be written.
    """

    def __init__(self, path: str | os.PathLike[str], model: Mapping[str, str], settings: Mapping[str, str]) -> None:
        check_writable(path)
        self.path = Path(path)
        self._of = {"model": dict(model), "settings": dict(settings)}
        self._batches: list[str] = []
        self._counts: list[int] = []  # tokens in each

    def load(self, max_tokens: int | None) -> Measurements | None:
        """What the file holds, to go on from there, if it is no more than is asked for; None if there is no file."""
        if not self.path.exists():
            return None
        again = "remove it to record from the start, or give another file"
        try:
            if (found := unseal(self.path, FORMAT)) is None:
                raise RecordError(f"{str(self.path)!r} is no state of a recording: give another file")
            header, tensors = found
            for what, own in self._of.items():
                if header[what] != own:
                    raise RecordError(f"{str(self.path)!r} is the state of a recording with another {what}: {again}")
            self._batches = typed(list[str], header["batches"], "batches")
            self._counts = typed(list[int], header["counts"], "counts")
            states: dict[str, dict[str, Tensor]] = defaultdict(dict)
            for key, tensor in tensors.items():
                name, _, part = key.partition(".")
                states[name][part] = tensor
            measured = Measurements(
                places=typed(tuple[BranchRecord, ...], header["branches"], "branches"),
                windows=typed(tuple[tuple[str, ...], ...], header["windows"], "windows"),
                tokens=sum(self._counts),
                batches=len(self._batches),
                units=states.pop(_UNITS, {}),
                **{name: Tally.of(state) for name, state in states.items()},
            )
            measured.check()
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise RecordError(f"the state {str(self.path)!r} cannot be read ({error}): {again}") from error
        if max_tokens is not None and sum(self._counts[:-1]) >= max_tokens:
            raise RecordError(
                f"{str(self.path)!r} is the state of another run: it has recorded {measured.tokens} tokens, more than "
                f"max_tokens={max_tokens}: {again}"
            )
        return measured

    def check(self, number: int, batch: Mapping[str, object]) -> None:
        """See that a batch that is passed over is the one that was recorded."""
        if self._batches[number] != digest_batch(batch):
            raise RecordError(
                f"batch {number} is not the one that {str(self.path)!r} has recorded: give the same batches in the "
                "same order, or remove the file"
            )

    def check_all(self, number: int) -> None:
        """See that the ``number`` batches that there were are not fewer than were recorded."""
        if number < len(self._batches):
            raise RecordError(
                f"{str(self.path)!r} is the state of another run: it has recorded {len(self._batches)} batches, of "
                f"which only {number} were given: give the same batches, or remove the file"
            )

    def save(self, measured: Measurements, digest: str) -> None:
        """Write the state after one more batch."""
        self._batches.append(digest)
        self._counts.append(measured.tokens - sum(self._counts))
        header: dict[str, object] = {
            **self._of,
            "batches": self._batches,
            "counts": self._counts,
            "branches": [asdict(branch) for branch in measured.places],
            "windows": measured.windows,
        }
        tensors = {f"{n}.{key}": t for n, tally in measured.tallies.items() for key, t in tally.state().items()}
        tensors |= {f"{_UNITS}.{name}": sums for name, sums in measured.units.items()}
        write_atomically(self.path, seal(FORMAT, header, tensors))


def digest_batch(batch: Mapping[str, object]) -> str:
    """What tells one batch from another: names, shapes and values."""
    digest = hashlib.sha256()
    for key in sorted(batch):
        digest.update(key.encode())
        for leaf in tree_leaves(batch[key]):
            if isinstance(leaf, Tensor):
                digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
                digest.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()
