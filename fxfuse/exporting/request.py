"""What is to be exported, as the formats are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from fxfuse.errors import OptionError
from fxfuse.exporting.stream import Planned, planned_stream
from fxfuse.plan import Plan


@dataclass(frozen=True)
class Request:
    """What is to be exported.

    Attributes:
        model: the model; it is not changed.
        plan: its plan.
        example: the arguments of one call without a cache.
        tokenizer: a Hugging Face tokenizer, or None.
        progress: whether to show any.
        check: compare what the written folder computes with the planned model.
        options: what only this format knows.
    """

    model: nn.Module
    plan: Plan
    example: Mapping[str, object]
    tokenizer: object
    progress: bool
    check: bool
    options: Mapping[str, object] = field(default_factory=dict)

    def no_options(self, form: str) -> None:
        """Raise an OptionError if any option was given, for a format that knows none."""
        if self.options:
            raise OptionError(f"the format {form!r} knows no option {next(iter(self.options))!r}")

    def planned(self) -> Planned:
        """The stream of the model and what the plan makes of it; see :func:`planned_stream`."""
        return planned_stream(self.model, self.plan, self.example)
