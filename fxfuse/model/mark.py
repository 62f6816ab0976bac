"""What a config says of a plan that its weights need: an entry that goes to config.json and is read from there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict

from fxfuse._common.typed import typed
from fxfuse.errors import PlanError
from fxfuse.plan import Plan

ENTRY = "fxfuse"
"""The entry of a config that holds a mark."""


@dataclass(frozen=True)
class Mark:
    """The plan of a model, and what it has made of the weights.

    Attributes:
        plan: that was applied, or that the weights were healed for.
        healed: whether they were.
        maps: attentions with linear maps of their own.
        narrowed: FFNs of which some units have left the weights.
    """

    plan: Plan
    healed: bool
    maps: tuple[str, ...] = ()
    narrowed: tuple[str, ...] = ()

    @property
    def narrow(self) -> Plan:
        """What it says of FFNs whose weights are narrowed: a plan of nothing else, empty for most."""
        return Plan(narrow={name: self.plan.narrow[name] for name in self.narrowed})

    def entry(self) -> dict[str, object]:
        """The entry of the config, as JSON can say it."""
        plan = json.loads(self.plan.model_copy(update={"why": ()}).to_json())
        lists = {key: list(names) for key, names in (("maps", self.maps), ("narrowed", self.narrowed)) if names}
        return {"plan": plan, "digest": self.plan.digest, "healed": self.healed, **lists}


@dataclass(frozen=True)
class _Entry:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    plan: dict[str, object]
    healed: bool
    digest: str = ""  # of the plan; there was none at first
    maps: tuple[str, ...] = field(default=())
    narrowed: tuple[str, ...] = field(default=())


def read_mark(entry: object) -> Mark:
    """The mark that ``entry`` is.

    Raises:
        PlanError: it is none, or not as it was written.
    """
    source = f"the entry {ENTRY!r} of the model's config"
    try:
        held = typed(_Entry, entry)
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(
            f"{source} is not what fxfuse writes there ({error}): load the model from a whole copy"
        ) from error
    mark = Mark(Plan.from_json(json.dumps(held.plan), source), held.healed, held.maps, held.narrowed)
    if held.digest not in ("", mark.plan.digest) or not {*held.narrowed} <= {*mark.plan.narrow}:
        raise PlanError(f"{source} holds another plan than was written there: load the model from a whole copy")
    return mark
