"""The modelling files of an exported folder: the model's own class, edited, under a name of its own.

The model type is another one, too, so that no reader takes the folder for one of the original's.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fxfuse.errors import ExportError
from fxfuse.exporting.copied import planned_edit

_CONFIGURATION = '''"""Configuration of {kind} under a plan. Written by fxfuse."""

from {config_module} import {config}


class PlannedConfig({config}):
    """The original's; ``planned`` says how modules are edited."""

    model_type = "{model_type}"
'''

_MODELING = '''"""{kind} under a plan. Written by fxfuse."""

from {module} import {kind}, {base}

from .configuration_planned import PlannedConfig
from .planned_edit import EditedForCausalLM, EditedModel


class PlannedModel(EditedModel, {base}):
    """The base model."""

    config_class = PlannedConfig


class PlannedForCausalLM(EditedForCausalLM, {kind}):
    """The causal language model."""

    config_class = PlannedConfig
'''


def base_of(model: nn.Module) -> str:
    """The path of the base model, without head."""
    base = getattr(model, "base_model_prefix", "")
    inner = getattr(model, base, None) if base else None
    if not isinstance(inner, nn.Module) or not type(model).__module__.startswith("transformers."):
        raise ExportError(
            f"{type(model).__name__} is no causal language model of transformers with a base model: this format writes "
            "its class down by name"
        )
    return str(base)


def model_type_of(model: nn.Module) -> str:
    """What the folder's config calls its model."""
    config: Any = model.config
    return f"planned_{config.model_type}"


def code_of(model: nn.Module) -> dict[str, str]:
    """The files that the folder has of its own, by name."""
    config: Any = type(model.config)
    words = {
        "kind": type(model).__name__,
        "module": type(model).__module__,
        "base": type(model.get_submodule(base_of(model))).__name__,
        "config": config.__name__,
        "config_module": config.__module__,
        "model_type": model_type_of(model),
    }
    return {
        "configuration_planned.py": _CONFIGURATION.format(**words),
        "modeling_planned.py": _MODELING.format(**words),
    }


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class that those files define, without reading them."""
    given: Any = type(model.config)
    config = type("PlannedConfig", (given,), {"model_type": model_type_of(model), "__module__": __name__})
    bases = (planned_edit.EditedForCausalLM, type(model))
    return type("PlannedForCausalLM", bases, {"config_class": config, "__module__": __name__})
