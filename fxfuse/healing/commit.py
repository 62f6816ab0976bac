"""Commit: a model gets its healed weights and the mark of the plan that they serve, both or neither."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fxfuse.healing.mapped import Mapped
from fxfuse.model.healed import mark_healed, marks
from fxfuse.plan import Plan


def commit(model: nn.Module, plan: Plan, weights: Mapping[str, Tensor], mapped: Mapped | None = None) -> None:
    """Write ``weights`` into the parameters of ``model``, by name, and mark it as healed for ``plan``.

    Attentions that need a map of their own, as ``mapped`` says, get it first. An error, or an interruption at any
    point, leaves the model as it was. That takes a copy of the old values.

    Raises:
        PlanError: the model is healed for another plan.
    """
    with ExitStack() as undo:
        undo.callback(marks(model))
        if mapped is not None:
            mapped.put(undo, model)
        _write(undo, model, weights)
        mark_healed(model, plan)
        undo.pop_all()


@torch.no_grad()
def _write(undo: ExitStack, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    parameters = {name: model.get_parameter(name) for name in weights}
    old = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    undo.callback(_copy, parameters, old)
    _copy(parameters, weights)


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
