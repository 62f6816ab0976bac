"""Narrowing: the hidden units that an FFN does not keep leave the parameters of its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from fxfuse._common.units import Narrowed, Units
from fxfuse.passes.unit_weights import Part

_UNITS = "_fxfuse_units"
"""The attribute of a module that holds the units which it kept."""

_FEATURES: Mapping[str, int] = {"out_features": 0, "in_features": 1, "nf": 1, "nx": 0}
"""The attributes by which modules know the sizes of their weight, and its dimensions: nn.Linear's, and Conv1D's."""


def units_of(module: nn.Module) -> Units | None:
    """The units that pruning left to an FFN; None if it has all that it had."""
    units: Units | None = vars(module).get(_UNITS)
    return units


def narrowed_in(model: nn.Module) -> Narrowed:
    """The modules of ``model`` that pruning narrowed, and the units that they kept."""
    made = {name: units_of(module) for name, module in model.named_modules()}
    return Narrowed({name: units for name, units in made.items() if units is not None})


@torch.no_grad()
def take_units(undo: ExitStack, model: nn.Module, name: str, units: Units, parts: Sequence[Part]) -> None:
    """Let the FFN ``name`` have ``parts`` of its parameters only, until ``undo`` closes."""
    for part in parts:
        path, _, own = part.name.rpartition(".")
        module = model.get_submodule(path)
        old = module.get_parameter(own)
        kept = torch.tensor(part.indices, device=old.device)
        undo.callback(_restore, module, own, old, {key: vars(module)[key] for key in _FEATURES if key in vars(module)})
        setattr(module, own, nn.Parameter(old.index_select(part.dim, kept), requires_grad=old.requires_grad))
        if own == "weight":
            vars(module).update(
                {key: module.get_parameter(own).shape[dim] for key, dim in _FEATURES.items() if key in vars(module)}
            )
    module = model.get_submodule(name)
    undo.callback(vars(module).pop, _UNITS, None)
    vars(module)[_UNITS] = units


def _restore(module: nn.Module, own: str, old: nn.Parameter, features: Mapping[str, object]) -> None:
    setattr(module, own, old)
    vars(module).update(features)
