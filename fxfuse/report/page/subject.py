"""The subject of a page: a recording, and perhaps a plan and the results of a search, seen to fit each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fxfuse.measure.recording import BranchRecord, Recording
from fxfuse.plan import Plan, flat
from fxfuse.report.page.results import Result
from fxfuse.report.table import shared_path

LETTERS = {"attention": "A", "gated_ffn": "F", "ffn": "F", "linear": "L", "moe": "M", "other": "O"}
"""A letter for each kind of branch, where there is no room for its name."""

WORDS = {"A": "attention", "F": "FFN", "L": "linear map", "M": "mixture of experts", "O": "other"}

ROOM = 16
"""Letters of a name that a picture has room for."""


@dataclass(frozen=True)
class Subject:
    """All that a page shows.

    Attributes:
        recording: of a model.
        plan: for that model; None to show none.
        results: of a search among plans.

    Raises:
        PlanError: the plan names a branch that the recording has not; the message has the nearest ones.
    """

    recording: Recording
    plan: Plan | None = None
    results: tuple[Result, ...] = ()

    def __post_init__(self) -> None:
        for name in self.plan.names if self.plan is not None else ():
            if name not in self.recording.plan.names:  # what was dropped before recording is not in the recording
                self.recording.index(name)

    @cached_property
    def prefix(self) -> str:
        """The beginning that the names of all branches share."""
        return shared_path([branch.name for branch in self.recording.branches])

    def short(self, name: str) -> str:
        """The name without the beginning that all share."""
        return name.removeprefix(self.prefix)

    @cached_property
    def labels(self) -> list[str]:
        """The short names, in stream order, for a picture: of one that is longer than ``ROOM`` its end."""
        names = [self.short(branch.name) for branch in self.recording.branches]
        return [name if len(name) <= ROOM else f"…{name[1 - ROOM :]}" for name in names]

    @cached_property
    def numbers(self) -> list[str]:
        """A number for each branch, where there is no room for its name.

        The one that its short name begins with, if that is so of all (of ``5.mlp`` 5); else its place in the stream.
        """
        heads = [self.short(branch.name).split(".")[0] for branch in self.recording.branches]
        return heads if all(map(str.isdecimal, heads)) else [str(index) for index in range(len(heads))]

    @cached_property
    def _edits(self) -> dict[str, str]:
        if self.plan is None:
            return {}
        edits = dict.fromkeys(self.plan.drop, "dropped")
        for number, group in enumerate(self.plan.parallel):
            edits |= dict.fromkeys(flat(group), f"in parallel, group {number}")
        for name in self.plan.linear:
            edits[name] = ", ".join(["linear", *([edits[name]] if name in edits else [])])
        for name, units in self.plan.narrow.items():
            edits[name] = ", ".join([f"narrowed to {len(units)} units", *([edits[name]] if name in edits else [])])
        return edits

    def edit(self, name: str) -> str:
        """Says in words what the plan does with the branch: "" if nothing."""
        return self._edits.get(name, "")

    def dropped(self, name: str) -> bool:
        """Whether the plan drops the branch."""
        return self.edit(name) == "dropped"

    def linear(self, name: str) -> bool:
        """Whether the plan makes the attention one linear map."""
        return self.edit(name).startswith("linear")

    def width(self, name: str) -> int:
        """The hidden units of a recorded branch under the plan; 0 of what has none."""
        narrow = {} if self.plan is None else self.plan.narrow
        return len(narrow[name]) if name in narrow else self.recording.branches[self.recording.index(name)].width

    def describe(self, branch: BranchRecord) -> str:
        """What is known of a branch, a fact a line."""
        recording = self.recording
        index = recording.index(branch.name)
        facts = [branch.name, f"branch {index}, {branch.kind}"]
        if edit := self.edit(branch.name):
            facts[1] += f": {edit}"
        facts += [f"{branch.width:,} hidden units"] * bool(branch.width)
        return "\n".join([*facts, f"{branch.parameters:,} parameters"])
