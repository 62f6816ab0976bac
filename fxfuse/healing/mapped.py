"""Maps of their own: attentions that a plan makes linear, and whose output projection reads too many features for that.

Under the plan such an attention is a module with a linear map (:mod:`fxfuse.model.stand_ins`), which the model does not
have. So a copy that has it runs under the plan, and shares the memory of all other weights with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn

from fxfuse.backend.frontend import capture
from fxfuse.data.batches import Batch, blaming, eval_mode, fresh, on_device_of
from fxfuse.graph.values import name_weights
from fxfuse.healing.student import student_of
from fxfuse.model.pruning import prune_until
from fxfuse.passes.linear import Facts, attention_ends
from fxfuse.passes.simplify import simplify
from fxfuse.plan import Plan
from fxfuse.stream.finder import find_streams


@dataclass(frozen=True)
class Mapped:
    """A model that has all modules whose weights a plan needs.

    Attributes:
        model: the original itself, if it has them; else a copy.
        maps: the attentions that have a map of their own there.
        example: the arguments of a call.
    """

    model: nn.Module
    maps: tuple[str, ...]
    example: Mapping[str, object]

    def put(self, undo: ExitStack, model: nn.Module) -> None:
        """Give the original the same modules, for as long as ``undo`` does not close."""
        _put(undo, model, self.maps, self.example)


def mapped(model: nn.Module, plan: Plan, example: Batch) -> Mapped:
    """``model``, or a copy of it with the maps that ``plan`` needs. They hold zeros.

    Args:
        model: the original; it is called once if the plan makes anything linear.
        plan: what will be followed.
        example: the arguments of the call.

    Raises:
        PlanError: an attention cannot be made linear.
        PruneError: one cannot get a map of its own.
        CaptureError, RecordError: the model cannot be called or traced.
    """
    if not plan.linear:
        return Mapped(model, (), {})
    given = on_device_of(model, fresh(example))
    names: list[str] = []
    with eval_mode(model), blaming(0, example):
        for captured in capture(model, **given):
            name_weights(captured.names)
            simplify(captured.gm)
            facts = Facts.of(captured.gm)
            for stream in find_streams(captured.gm, captured.names):
                for branch in stream.branches:
                    if branch.name in plan.linear and branch.kind == "attention":
                        ends = attention_ends(branch, stream, facts)
                        names += [branch.name] * (ends.output.fan_in != ends.width)
        if not names:
            return Mapped(model, (), {})
        copy = student_of(model, ())
        _put(ExitStack(), copy, tuple(names), given)
    return Mapped(copy, tuple(names), given)


def _put(undo: ExitStack, model: nn.Module, maps: tuple[str, ...], example: Mapping[str, object]) -> None:
    if maps:
        prune_until(undo, model, Plan(linear=maps), (), fresh(example))
