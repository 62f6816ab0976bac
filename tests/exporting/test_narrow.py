"""A narrowed FFN is as wide as it has units in every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from fxfuse.errors import PlanError
from fxfuse.exporting.copied.modeling_decilm import DeciLMForCausalLM
from tests.exporting.families import difference, greedy, loaded, tiny
from tests.exporting.test_gguf import fields, tensors, written
from tests.exporting.test_transformers import attn, block, mlp
from tests.models.tiny import silenced

UNITS = tuple(range(0, 40, 3))
ALONE = fxfuse.Plan(narrow={mlp(1)[0]: UNITS, mlp(3)[0]: range(5)})
FUSED = fxfuse.Plan(drop=attn(2), narrow={mlp(1)[0]: UNITS, mlp(2)[0]: range(5)}, parallel=[mlp(1, 2)])
BLOCKS = fxfuse.Plan(narrow={mlp(2)[0]: UNITS}, parallel=[[block(2), block(3)]])


@pytest.mark.parametrize("plan", [ALONE, FUSED, BLOCKS], ids=["alone", "fused", "blocks"])
@pytest.mark.parametrize("family", ["llama", "phi3", "granite"])
def test_a_folder_computes_what_the_planned_model_does(family: str, plan: fxfuse.Plan, tmp_path: Path) -> None:
    model = tiny(family)

    folder = fxfuse.export(model, plan, tmp_path / "out")

    made, wanted = loaded(folder), silenced(model, plan)
    assert difference(made, wanted) < 1e-8
    assert difference(made, model) > 1e-4
    assert torch.equal(greedy(made), greedy(wanted))


def test_a_model_that_was_pruned_is_exported_as_the_one_that_was_not(tmp_path: Path) -> None:
    model = tiny("llama")
    first = fxfuse.export(model, ALONE, tmp_path / "first")
    fxfuse.prune(model, ALONE)

    second = fxfuse.export(model, ALONE, tmp_path / "second")

    assert difference(loaded(first), loaded(second)) == 0
    widths = json.loads((second / "per_layer_config.json").read_text())
    assert widths == {"1": {"intermediate_size": 14}, "3": {"intermediate_size": 5}}


def test_a_llama_of_engines_has_the_width_in_its_layer(tmp_path: Path) -> None:
    model = tiny("llama")

    folder = fxfuse.export(model, ALONE, tmp_path / "out", format="nemotron-nas")

    made: Any = DeciLMForCausalLM.from_pretrained(folder, dtype="auto")
    assert difference(made, silenced(model, ALONE)) < 1e-8
    weight = made.get_parameter("model.layers.1.mlp.gate_proj.weight")
    assert torch.equal(weight[:14], model.get_parameter("model.layers.1.mlp.gate_proj.weight")[list(UNITS)])
    assert not weight[14:].any()


def test_llama_cpp_gets_the_width_in_its_layer(tmp_path: Path) -> None:
    reader = written("llama", ALONE, tmp_path / "out")

    down: Tensor = tiny("llama", torch.float32).get_parameter("model.layers.1.mlp.down_proj.weight")[:, list(UNITS)]
    assert fields(reader)["feed_forward_length"] == [64, 32, 64, 32, 64, 64]  # multiples of 32
    held = tensors(reader)["blk.1.ffn_down.weight"]
    assert torch.equal(held[:, :14], down) and not held[:, 14:].any()


def test_a_norm_behind_the_ffn_keeps_it_from_being_narrowed(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be narrowed: its output is not a linear projection but a norm"):
        fxfuse.export(tiny("gemma3"), ALONE, tmp_path / "out")
