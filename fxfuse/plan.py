"""The plan: the only thing in fxfuse that changes what a model computes.

A plan names branches of the residual stream and says of each whether it leaves (``drop``), whether one linear map takes
the place of an attention (``linear``), which hidden units an FFN keeps (``narrow``), and where it reads and is added
(``parallel``). It is data: immutable, readable
JSON, versioned, valid for all graphs of its model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError, field_serializer, model_validator

from fxfuse._common.files import write_atomically
from fxfuse._common.units import Narrowed, Units
from fxfuse.errors import PlanError

Member: TypeAlias = str | tuple[str, ...]
"""A branch, or a private sequence: branches that run in order on a copy of the stream of their own."""

Group: TypeAlias = tuple[Member, ...]


@dataclass(frozen=True)
class Decision:
    """What became of one edit that was thought of, and why.

    Attributes:
        edit: "drop" a branch, make an attention "linear", "narrow" an FFN, or make FFNs "parallel".
        branches: the branch, or the group.
        outcome: "kept", "split" (its halves have decisions of their own) or "refused".
        why: in words.
        score: what it was proposed by: the attention's score, or the group's largest mean distance; in a search for a
            target the edit's KL by itself, NaN if it was only measured together with others.
        kl: measured KL of the plan with this edit and those kept before, nats per token; None if not measured.
        added: how much of that is this edit's.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=False)  # JSON has lists for tuples

    edit: Literal["drop", "linear", "narrow", "parallel"]
    branches: tuple[str, ...]
    outcome: Literal["kept", "split", "refused"]
    why: str
    score: float
    kl: float | None = None
    added: float | None = None

    def __str__(self) -> str:
        measured = "" if self.kl is None else f", KL {self.kl:.4g}"
        return f"{self.outcome} {self.edit} {' + '.join(self.branches)} (score {self.score:.4g}{measured}): {self.why}"


class Plan(BaseModel):
    """Semantic edits of a residual stream, by branch name.

    Attributes:
        version: of the file format; this library reads and writes 1.
        drop: branches that no longer contribute to the stream (LLM-Drop; Puzzle's no-op blocks).
        linear: attentions that contribute one linear map of each token instead, ``W norm(x) + b``: their own norm at
            the point that they read, then their output projection, and what follows it (NBL, arXiv 2505.21077; Puzzle's
            linear blocks). Where that projection does not map the stream's width to itself, ``fxfuse.prune`` and
            ``fxfuse.apply`` put a map there that does. Such a branch may be a member of a group, too.
        narrow: of each FFN in it the hidden units that it keeps, by index: it computes these, and its down projection
            reads these (Puzzle, arXiv 2411.19146). Given as numbers or as text, "0-511,600"; kept as ascending tuples.
            Such a branch may be a member of a group, too.
        parallel: groups. A group stands where its first member stands in the stream; all its members read the stream
            there and the sum of their contributions is added there. FFN Fusion is ``[["l5.mlp", "l6.mlp"]]``; layer
            parallelism ``[["l5.attn", "l6.attn"], ["l5.mlp", "l6.mlp"]]``; the full-block parallelism of
            arXiv 2503.18908, appendix B, ``[[["l5.attn", "l5.mlp"], ["l6.attn", "l6.mlp"]]]``.
        why: how the plan came about: each edit that was thought of, kept or not, in the order in which it was decided.
            It changes nothing, so plans that differ only in it are equal.

    Raises:
        PlanError: an entry is empty, not a name, or named twice (but for one in ``linear`` or ``narrow`` and in a
            group), or units are none; the message quotes it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    drop: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    narrow: InstanceOf[Narrowed] = Narrowed()
    parallel: tuple[Group, ...] = ()
    why: tuple[Decision, ...] = Field(default=(), exclude=True, repr=False)

    @field_serializer("narrow")
    def _as_text(self, narrow: Narrowed) -> dict[str, str]:
        return narrow.as_text()

    def __init__(self, **data: object) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise PlanError(_explain(error)) from error

    @model_validator(mode="before")
    @classmethod
    def _accept_lists(cls, data: object) -> object:
        """JSON and people write lists; what a plan keeps are tuples, because a plan is immutable."""
        if isinstance(data, dict):
            listed = ("drop", "linear", "parallel", "why")
            made = {key: _tuples(value) if key in listed else value for key, value in data.items()}
            narrow = made.get("narrow", {})
            if not isinstance(narrow, Mapping):
                raise ValueError(f"narrow is {narrow!r}, not the hidden units of each FFN by its name")
            return made | {"narrow": Narrowed(narrow)}
        return data

    @model_validator(mode="after")
    def _each_branch_once(self) -> Plan:
        for index, group in enumerate(self.parallel):
            if len(group) < 2:
                raise ValueError(f"parallel[{index}] has {len(group)} member(s); a group needs at least two")
            if any(member == () for member in group):
                raise ValueError(f"parallel[{index}] has an empty private sequence")
        seen: dict[str, str] = {}
        for name, where in self._entries():
            if not name.strip():
                raise ValueError(f"{where} is an empty name")
            if name in seen and not (seen[name].startswith(("linear", "narrow")) and where.startswith("parallel")):
                raise ValueError(f"{name!r} is in {seen[name]} and again in {where}; a branch is edited at most once")
            seen[name] = where
        return self

    def _entries(self) -> Iterator[tuple[str, str]]:
        for index, name in enumerate(self.drop):
            yield name, f"drop[{index}]"
        for index, name in enumerate(self.linear):
            yield name, f"linear[{index}]"
        for name in self.narrow:
            yield name, "narrow"
        for index, group in enumerate(self.parallel):
            for name in flat(group):
                yield name, f"parallel[{index}]"

    @property
    def names(self) -> tuple[str, ...]:
        """Every branch that the plan edits, once, in the plan's order."""
        return tuple(dict.fromkeys(name for name, _ in self._entries()))

    def __bool__(self) -> bool:
        return bool(self.drop or self.linear or self.narrow or self.parallel)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._edits == other._edits

    def __hash__(self) -> int:
        return hash(self._edits)

    @property
    def _edits(self) -> tuple[tuple[str, ...], tuple[str, ...], Mapping[str, Units], tuple[Group, ...]]:
        return self.drop, self.linear, self.narrow, self.parallel

    @property
    def digest(self) -> str:
        """The SHA-256 of the edits, in hexadecimal: the same for plans that differ only in order, or in ``why``."""
        edits = self.model_dump(exclude={"version", "why"})
        narrow = {"narrow": narrow} if (narrow := edits.pop("narrow")) else {}
        kinds = {kind: sorted(map(_canonical, entries)) for kind, entries in edits.items() if entries} | narrow
        return hashlib.sha256(json.dumps(kinds, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """What a file of the plan holds; ``linear`` and ``narrow`` only if they name any; decisions one a line."""
        linear = {"linear": self.linear} if self.linear else {}
        narrow = {"narrow": self.narrow.as_text()} if self.narrow else {}
        edits = {"version": self.version, "drop": self.drop, **linear, **narrow, "parallel": self.parallel}
        text = json.dumps(edits, indent=2)
        if not self.why:
            return text
        made = [{key: value for key, value in asdict(each).items() if value is not None} for each in self.why]
        return f'{text[:-2]},\n  "why": [\n    ' + ",\n    ".join(map(json.dumps, made)) + "\n  ]\n}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically: a reader sees the old file or the new one, never a part."""
        write_atomically(path, f"{self.to_json()}\n".encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by :meth:`save` or by hand.

        Raises:
            PlanError: no such file, not JSON (a truncated file, say), or not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a mark
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"plan file {os.fspath(path)!r} cannot be read: {error}") from error
        return cls.from_json(text, source=os.fspath(path))

    @classmethod
    def from_json(cls, text: str, source: str = "<text>") -> Plan:
        """The plan that ``text`` describes; ``source`` names it in errors."""
        try:
            data = json.loads(text, object_pairs_hook=_each_key_once)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PlanError(f"plan {source!r} is not JSON ({error}); was it cut short?") from error
        except PlanError as error:
            raise PlanError(f"plan {source!r}: {error}") from error
        if not isinstance(data, dict):
            raise PlanError(
                f"plan {source!r} holds a {type(data).__name__}, not an object with drop, linear, narrow and parallel"
            )
        try:
            return cls(**data)
        except PlanError as error:
            raise PlanError(f"plan {source!r}: {error}") from error


def flat(group: Group) -> tuple[str, ...]:
    """The branches of a group in its own order, private sequences opened."""
    return tuple(name for member in group for name in ((member,) if isinstance(member, str) else member))


def _canonical(entry: str | Group) -> str:
    """An entry of a plan as JSON; the members of a group have no order, those of a private sequence do."""
    return json.dumps(entry if isinstance(entry, str) else sorted(map(json.dumps, entry)))


def _each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; json itself would keep the last of two equal keys and say nothing."""
    data = dict(pairs)
    for key in data:
        if [name for name, _ in pairs].count(key) > 1:
            raise PlanError(f"{key!r} stands there twice")
    return data


def _tuples(value: object) -> object:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _explain(error: ValidationError) -> str:
    """One line a person understands, of pydantic's first complaint."""
    first = error.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][:3])[1:]
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"unknown entry {where!r}; a plan has version, drop, linear, narrow and parallel"
    if where == "version":
        return f"version {first['input']!r} is not one this library reads (it reads 1)"
    return f"{where}: {first['msg']}, got {first['input']!r}"


class PlanFile:
    """A plan as it stood in a file when it was read.

    Equal to the path of the file for as long as the file holds the same plan: that is how torch.compile, which compares
    options to decide whether a compiled graph still serves, comes to notice that the file has changed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._seen = _status(self.path)
        self.plan = Plan.load(self.path)
        self._digest = _digest(self.path)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PlanFile):
            return self.path == other.path and self._digest == other._digest
        return isinstance(other, str | os.PathLike) and os.fspath(other) == self.path and self._unchanged()

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return f"PlanFile({self.path!r}, {self._digest[:8]})"

    def _unchanged(self) -> bool:
        status = _status(self.path)
        if status != self._seen and status is not None and _digest(self.path) == self._digest:
            self._seen = status
        return status == self._seen


def _status(path: str) -> tuple[int, ...] | None:
    """What differs when the file does: a copy may keep length and time, but not the inode, or when that was written."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def edits_of(plan: Plan | PlanFile | str | os.PathLike[str] | None) -> Plan:
    """The plan that a backend's option ``plan`` stands for; an empty one if none was given."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, PlanFile):
        return plan.plan
    return Plan.load(plan) if plan is not None else Plan()
