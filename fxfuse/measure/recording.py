"""A recording: what was measured of a model's branches, as a file that survives the session.

It is made by :func:`fxfuse.record` and read by :func:`fxfuse.make_plan`. Which branches depend on which, how much the
stream and the output change when one leaves or when several read one point. Numbers only: no weights, no text.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from fxfuse._common.files import write_atomically
from fxfuse._common.sealed import seal, unseal
from fxfuse._common.typed import typed
from fxfuse._torch.compiled import original
from fxfuse.errors import PlanError, RecordError, nearest
from fxfuse.plan import Plan
from fxfuse.stream.branch import Kind

FORMAT = "fxfuse-recording"
VERSION = 1

_UNITS = "units."
"""Before the name of an FFN: the tensor of a file that holds what its hidden units are good for."""

_TENSORS = ("mean", "p99", "max", "cosine", "norm_ratio", "kl")


@dataclass(frozen=True)
class BranchRecord:
    """A branch as the recorded graph has it.

    Attributes:
        name: what a plan calls it.
        kind: gated_ffn, ffn, attention, linear, moe or other.
        stream: the number of its residual stream.
        reads: the number of residual sums before the point that it reads.
        adds: the number of the residual sum that it is added in.
        parameters: how many numbers its weights hold.
        width: hidden units of an FFN that can become a part of a wide one; 0 of anything else.
        reason: why it can not, if it can not.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    kind: Kind
    stream: int
    reads: int
    adds: int
    parameters: int
    width: int
    reason: str


@dataclass(frozen=True)
class GroupRecord:
    """What became of the stream when consecutive FFNs read one point of it.

    Attributes:
        branches: the group, in stream order.
        mean, p99, max: over tokens, of ``|x' - x| / |x|``, ``x`` the stream after the group's last member, ``x'`` the
            same with the group parallel.
        kl: nats per token, of the original's next-token distribution from the changed one's; NaN without logits.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    branches: tuple[str, ...]
    mean: float
    p99: float
    max: float
    kl: float


@dataclass(frozen=True)
class Recording:
    """Measurements over ``tokens`` tokens of a model that follows ``plan`` (usually drops, or nothing).

    Attributes:
        branches: m of them, in stream order; all tensors below are float32 in this order.
        mean, p99, max: ``[m, m]``, row = dropped branch, column = measured branch: over tokens, the cosine distance
            (0..2) of the column's contribution from what it is when the row is dropped and everything after it
            computed anew. 0 where the drop changes nothing. The dependency matrix of arXiv 2503.18908. ``p99`` comes
            from a histogram, to 3%.
        cosine: ``[m]``, mean cosine of the stream before and after the branch (LLM-Drop, arXiv 2406.15786).
        norm_ratio: ``[m]``, mean of ``|contribution| / |stream before|``.
        kl: ``[m]``, nats per token: the recorded model's next-token distribution from the one without the branch
            (the replace-one-block score of Puzzle, arXiv 2411.19146); NaN if the model has no logits.
        groups: candidates measured.
        tokens: how many token positions every number averages over.
        units: of each FFN that tells its hidden units, by name, float32 ``[width]``: the mean over tokens of
            ``|activation| * ||down column||``, Puzzle's measure of what a unit is good for. Empty in older files.
        plan: what the recorded model followed.
        model: digest of names and shapes, and of weights; see :func:`model_digest`.
        made: when and by what; see :func:`fxfuse.measure.provenance.provenance`. Empty if the file does not say.
    """

    branches: tuple[BranchRecord, ...]
    mean: Tensor
    p99: Tensor
    max: Tensor
    cosine: Tensor
    norm_ratio: Tensor
    kl: Tensor
    groups: tuple[GroupRecord, ...]
    tokens: int
    units: Mapping[str, Tensor] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)
    model: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)

    def index(self, name: str) -> int:
        """The row and column of the branch ``name``.

        Raises:
            PlanError: no branch has the name; the message has the nearest ones.
        """
        for index, branch in enumerate(self.branches):
            if branch.name == name:
                return index
        raise PlanError(f"the recording has no branch {name!r}{nearest(name, (b.name for b in self.branches))}")

    def units_of(self, name: str) -> Tensor:
        """What the hidden units of the FFN ``name`` are good for, float32 ``[width]``.

        Raises:
            RecordError: the recording has no such numbers: of an FFN, only an older one lacks them.
        """
        if name not in self.units:
            raise RecordError(f"the recording says nothing of the hidden units of {name!r}: record again")
        return self.units[name]

    def check(self, model: nn.Module) -> None:
        """See that this is a recording of ``model``.

        Raises:
            RecordError: of another model, or of other weights.
        """
        found = model_digest(model)
        if found["shapes"] != self.model.get("shapes"):
            raise RecordError(
                "this is a recording of another model: the names or shapes of the parameters differ. Record this one"
            )
        if found["weights"] != self.model.get("weights"):
            raise RecordError(
                "this is a recording of other weights of this model (trained on, or in another dtype): record again"
            )

    def __str__(self) -> str:
        rows = [
            (b.name, b.kind, f"{kl:.4f}", f"{cosine:.4f}", f"{ratio:.3f}")
            for b, kl, cosine, ratio in zip(
                self.branches, self.kl.tolist(), self.cosine.tolist(), self.norm_ratio.tolist(), strict=True
            )
        ]
        header = ("branch", "kind", "KL if dropped", "cos(in, out)", "|added|/|stream|")
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        lines = [
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
        ]
        for g in self.groups:
            what = f"stream off by {g.mean:.3f} (p99 {g.p99:.3f}, max {g.max:.3f}), KL {g.kl:.4f}"
            lines.append(f"{' + '.join(g.branches)} in parallel: {what}")
        return "\n".join([*lines, f"{self.tokens:,} tokens"])

    def to_json(self) -> str:
        """All numbers, as a JSON object; NaN is null."""
        numbers = {name: _without_nan(getattr(self, name).tolist()) for name in _TENSORS}
        groups = [{**asdict(group), "kl": _without_nan(group.kl)} for group in self.groups]
        branches = [asdict(branch) for branch in self.branches]
        return json.dumps({"tokens": self.tokens, "branches": branches, "groups": groups, **numbers}, indent=2)

    def to_bytes(self) -> bytes:
        """The file's content; equal for equal recordings."""
        header = {
            "version": VERSION,
            "branches": [asdict(branch) for branch in self.branches],
            "groups": [asdict(group) for group in self.groups],
            "tokens": self.tokens,
            "plan": json.loads(self.plan.to_json()),
            "model": dict(self.model),
            "made": dict(self.made),
        }
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return seal(FORMAT, header, tensors | {_UNITS + name: each for name, each in self.units.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically."""
        write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read what :meth:`save` wrote.

        Raises:
            RecordError: no such file, a truncated or damaged one, another format, or a newer version.
        """
        shown = repr(os.fspath(path))
        if not Path(path).is_file():
            raise RecordError(f"there is no recording {shown}")
        try:
            found = unseal(path, FORMAT)
        except (OSError, ValueError) as error:
            raise RecordError(f"recording {shown} cannot be read ({error}); was it cut short? Record again") from error
        if found is None:
            raise RecordError(f"{shown} is a safetensors file but no recording of fxfuse")
        header, tensors = found
        try:
            if header["version"] != VERSION:
                raise RecordError(
                    f"recording {shown} has version {header['version']!r}; this library reads {VERSION}: record again"
                )
            made = cls(
                branches=typed(tuple[BranchRecord, ...], header["branches"], "branches"),
                groups=typed(tuple[GroupRecord, ...], header["groups"], "groups"),
                tokens=typed(int, header["tokens"], "tokens"),
                units={key[len(_UNITS) :]: each for key, each in tensors.items() if key.startswith(_UNITS)},
                plan=Plan.from_json(json.dumps(header["plan"]), source=f"of {shown}"),
                model=typed(dict[str, str], header["model"], "model"),
                made=_texts(header.get("made", {})),
                **{name: tensors[name] for name in _TENSORS},
            )
        except (KeyError, ValueError, PlanError) as error:
            raise RecordError(
                f"recording {shown} is damaged ({type(error).__name__}: {error}); record again"
            ) from error
        made._consistent(shown)
        return made

    def _consistent(self, shown: str) -> None:
        m = len(self.branches)
        shapes = {name: (m, m) if name in ("mean", "p99", "max") else (m,) for name in _TENSORS}
        wrong = [name for name in _TENSORS if tuple(getattr(self, name).shape) != shapes[name]]
        widths = {branch.name: (branch.width,) for branch in self.branches}
        wrong += [f"units of {name}" for name, each in self.units.items() if tuple(each.shape) != widths.get(name)]
        floats = [*(getattr(self, name) for name in _TENSORS), *self.units.values()]
        if wrong or any(each.dtype != torch.float32 for each in floats):
            raise RecordError(f"recording {shown} is damaged: {', '.join(wrong) or 'dtypes'} do not fit; record again")
        if unknown := {name for group in self.groups for name in group.branches} - widths.keys():
            raise RecordError(f"recording {shown} is damaged: it has no branch {min(unknown)!r}; record again")


def _texts(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"'made' holds texts by name, not {value!r}")
    return value


def _without_nan(value: object) -> object:
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def model_digest(model: nn.Module) -> dict[str, str]:
    """Two digests: ``shapes``, of all names, shapes and dtypes of parameters and buffers, and ``weights``, of values.

    Of each tensor the bitwise sum and a thousand values spread over it enter: weights are read once, at the speed of
    memory, and any change but a deliberate forgery shows. Of a compiled model, those of the module itself.
    """
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    own = original(model)
    for name, tensor in sorted([*own.named_parameters(), *own.named_buffers()]):
        shapes.update(f"{name} {tuple(tensor.shape)}\n".encode())
        weights.update(f"{name} {tensor.dtype}\n".encode())
        if tensor.device.type != "meta" and tensor.numel():
            weights.update(_fingerprint(tensor.detach()))
    return {"shapes": shapes.hexdigest(), "weights": weights.hexdigest()}


_HASHED = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8,
                     torch.int16, torch.int32, torch.int64})  # fmt: skip
"""What torch.hash_tensor takes; the bits of all else pass for integers."""


def _fingerprint(tensor: Tensor) -> bytes:
    flat = tensor.resolve_conj().contiguous().flatten()
    if flat.dtype not in _HASHED:
        flat = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(flat.dtype.itemsize, torch.int64))
    sample = flat[:: max(1, flat.numel() // 1000)].contiguous()
    total = torch.hash_tensor(flat)
    return total.cpu().numpy().tobytes() + sample.cpu().view(torch.uint8).numpy().tobytes()
