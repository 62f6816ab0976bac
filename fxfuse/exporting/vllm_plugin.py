"""A plan that vLLM applies to a checkpoint while it loads it; nothing is exported before.

    vllm serve FOLDER --config-format fxfuse --load-format fxfuse --hf-overrides '{"fxfuse_plan": "plan.json"}'

vLLM finds :func:`register` by its entry point (`vllm.general_plugins`), and knows two names from then on, by the
registries that it has for that: a config format, which makes the config of nemotron-nas of a Llama-shaped folder and a
plan, and a load format, which makes the weights of that config from the folder's, one by one. The model that then runs
is vLLM's own, DeciLMForCausalLM. Seen with vLLM 0.32.

To tell what the planned model is, its graph is traced: each process of vLLM that reads the config or holds weights has
the whole original in the memory of the CPU meanwhile, also if the planned model is divided among several GPUs. Where
that is too much, export once, and serve the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxfuse.data.loading import Loaded, load
from fxfuse.errors import PlanError
from fxfuse.exporting.export import example_of
from fxfuse.exporting.nemotron_nas import checkpoint
from fxfuse.exporting.stream import planned_stream
from fxfuse.exporting.weights import Weight
from fxfuse.model import healed
from fxfuse.plan import Plan

NAME = "fxfuse"
"""Of the config format and of the load format."""

PLAN = "fxfuse_plan"
"""The entry of ``hf_overrides`` that names a plan's file."""


def register() -> None:
    """Tell vLLM of the two formats; it calls this in each of its processes, several times in some."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.transformers_utils.config import register_config_parser
    from vllm.transformers_utils.config_parser_base import ConfigParserBase

    class PlannedConfigParser(ConfigParserBase):  # type: ignore[misc]  # vLLM's classes have no types here
        """The config of the planned model."""

        def parse(self, model: str | Path, *args: object, **kwargs: object) -> tuple[dict[str, object], object]:
            from fxfuse.exporting.copied.configuration_decilm import DeciLMConfig

            config = json.loads(planned_config(str(model), plan_in(kwargs.get("hf_overrides"))))
            config.pop("auto_map")  # the code is here
            return config, DeciLMConfig(**config)

    class PlannedModelLoader(BaseModelLoader):  # type: ignore[misc]  # nor has this one
        """The weights of the planned model."""

        def download_model(self, model_config: Any) -> None:
            """There is nothing to download: the folder is here."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            plan = getattr(model_config.hf_config, PLAN, None)
            missing = {name for name, _ in model.named_parameters()}
            missing -= model.load_weights(planned_weights(model_config.model, plan))
            if missing:
                raise PlanError(f"vLLM's model has weights that the planned one has not: {sorted(missing)[:3]}")

    register_config_parser(NAME)(PlannedConfigParser)
    register_model_loader(NAME)(PlannedModelLoader)


def plan_in(overrides: object) -> str | None:
    """The file of the plan that ``hf_overrides`` names, if they name one.

    Raises:
        PlanError: they are a function.
    """
    if callable(overrides):
        raise PlanError(f"hf_overrides is a function: give a mapping with the entry {PLAN!r}, a plan's file")
    named = overrides.get(PLAN) if isinstance(overrides, dict) else None
    return None if named is None else str(named)


@lru_cache(maxsize=1)
def planned_config(folder: str, plan: str | None) -> str:
    """The config of the model in ``folder`` under the plan in a file, as JSON. vLLM asks several times.

    Raises:
        PlanError: there is no plan; or it does not fit the model.
        ExportError: nemotron-nas cannot say it.
    """
    config, _ = _checkpoint(folder, plan)
    return json.dumps(config)


def planned_weights(folder: str, plan: str | None) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight of that model, made one by one."""
    _, weights = _checkpoint(folder, plan)
    for name, weight in weights.items():
        yield name, weight()


def _checkpoint(folder: str, plan: str | None) -> tuple[dict[str, object], dict[str, Weight]]:
    given, before = load(folder), torch.get_default_dtype()
    chosen = _plan_of(given, folder, plan)
    healed.check(given.model, chosen)
    torch.set_default_dtype(torch.float32)  # vLLM has set another one, and the model is traced as it is elsewhere
    try:
        return checkpoint(planned_stream(given.model, chosen, example_of(given.model)), given.model)
    finally:
        torch.set_default_dtype(before)


def _plan_of(loaded: Loaded, folder: str, plan: str | None) -> Plan:
    chosen = loaded.plan if plan is None else Plan.load(plan)
    if chosen is None:
        raise PlanError(f'{folder!r} was healed for no plan: name one, --hf-overrides \'{{"{PLAN}": "plan.json"}}\'')
    return chosen
