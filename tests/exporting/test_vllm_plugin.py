from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import ExportError, PlanError
from fxfuse.exporting import vllm_plugin
from tests.exporting.families import tiny

PLAN = fxfuse.Plan(drop=["model.layers.2.self_attn"], parallel=[["model.layers.1.mlp", "model.layers.2.mlp"]])


@pytest.fixture
def original(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "original")
    return tmp_path / "original"


@pytest.fixture
def plan(tmp_path: Path) -> str:
    PLAN.save(tmp_path / "plan.json")
    return str(tmp_path / "plan.json")


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The config parser and the loader of the two registries, after registration."""
    made: dict[str, Any] = {}

    def registry(what: str) -> Callable[[str], Callable[[type], type]]:
        return lambda name: lambda kind: made.setdefault(f"{what} {name}", kind)

    for path, held in {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {"register_model_loader": registry("load")},
        "vllm.model_executor.model_loader.base_loader": {"BaseModelLoader": object},
        "vllm.transformers_utils": {},
        "vllm.transformers_utils.config": {"register_config_parser": registry("config")},
        "vllm.transformers_utils.config_parser_base": {"ConfigParserBase": object},
    }.items():
        module = ModuleType(path)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, path, module)
    vllm_plugin.register()
    return made


class Reader(nn.Module):
    """What vLLM's model is to a loader: parameters, and a way to fill them, which says which it has filled."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.weights = dict.fromkeys(names, torch.zeros(()))
        self.read: dict[str, Tensor] = {}

    def named_parameters(self, *_: object) -> Iterator[tuple[str, Any]]:
        return iter(self.weights.items())

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> set[str]:
        self.read = dict(weights)
        return set(self.read)


def test_vllm_is_given_the_config_and_the_weights_of_an_export(
    original: Path, plan: str, formats: dict[str, Any], tmp_path: Path
) -> None:
    folder = fxfuse.export(tiny("llama"), PLAN, tmp_path / "out", "nemotron-nas", check=False)
    wanted = load_file(folder / "model.safetensors")

    held, config = formats["config fxfuse"]().parse(original, False, hf_overrides={"fxfuse_plan": plan})
    config.update({"fxfuse_plan": plan})  # vLLM does that
    reader = Reader(*wanted)
    torch.set_default_dtype(torch.bfloat16)  # and that
    try:
        loading = SimpleNamespace(model=str(original), hf_config=config)
        formats["load fxfuse"]().load_weights(reader, loading)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)

    exported = json.loads((folder / "config.json").read_text())
    assert held == {name: value for name, value in exported.items() if name != "auto_map"}
    assert type(config).__name__ == "DeciLMConfig"
    assert reader.read.keys() == wanted.keys()
    assert all(torch.equal(reader.read[name], wanted[name]) for name in wanted)


def test_a_weight_that_is_given_by_nobody_is_an_error(original: Path, plan: str, formats: dict[str, Any]) -> None:
    loading = SimpleNamespace(model=str(original), hf_config=SimpleNamespace(fxfuse_plan=plan))

    with pytest.raises(PlanError, match=r"not: \['model.layers.7.mlp.bias'\]"):
        formats["load fxfuse"]().load_weights(Reader("model.norm.weight", "model.layers.7.mlp.bias"), loading)


@pytest.mark.parametrize(
    ("overrides", "error", "reason"),
    [
        (None, PlanError, "--hf-overrides"),
        ({"rope_theta": 1.0}, PlanError, "--hf-overrides"),
        (lambda config: config, PlanError, "is a function"),
        ({"fxfuse_plan": "pair.json"}, ExportError, "side by side"),
    ],
)
def test_what_cannot_be_applied_is_said(
    overrides: Any, error: type[Exception], reason: str, original: Path, formats: dict[str, Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    fxfuse.Plan(parallel=[["model.layers.1.self_attn", "model.layers.2.self_attn"]]).save("pair.json")

    with pytest.raises(error, match=reason):
        formats["config fxfuse"]().parse(str(original), False, hf_overrides=overrides)


def test_the_entry_point_is_that_function() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    (named,) = project["entry-points"]["vllm.general_plugins"].values()
    assert named == f"{vllm_plugin.__name__}:{vllm_plugin.register.__name__}"
