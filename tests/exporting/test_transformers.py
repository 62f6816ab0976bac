from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxfuse
from fxfuse.errors import ExportError
from tests.exporting.families import difference, greedy, loaded, tiny
from tests.models.tiny import planned


def attn(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.self_attn" for layer in layers]


def mlp(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.mlp" for layer in layers]


def block(layer: int) -> list[str]:
    return [*attn(layer), *mlp(layer)]


FUSED: dict[str, Any] = {"drop": attn(2, 3), "parallel": [mlp(1, 2, 3)]}
PAIRS: dict[str, Any] = {"parallel": [attn(1, 2), mlp(1, 2)]}
BLOCKS: dict[str, Any] = {"parallel": [mlp(0, 1), [block(2), block(3)]]}
ENDS: dict[str, Any] = {"drop": [*attn(0, 1, 5), *mlp(2)]}


@pytest.mark.parametrize("edits", [FUSED, PAIRS, BLOCKS, ENDS], ids=["fused", "pairs", "blocks", "ends"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma3", "granite", "olmo2", "moe"])
def test_a_folder_computes_what_the_planned_model_does(family: str, edits: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(family)

    folder = fxfuse.export(model, fxfuse.Plan(**edits), tmp_path / "out")

    made, wanted = loaded(folder), planned(model, **edits)
    assert difference(made, wanted) < 1e-8
    assert difference(made, model) > 1e-4
    assert torch.equal(greedy(made), greedy(wanted))


def test_a_linear_attention_is_one_map(tmp_path: Path) -> None:
    model = tiny("llama")
    plan = fxfuse.Plan(drop=attn(3), linear=attn(0, 2), parallel=[mlp(2, 3)])

    folder = fxfuse.export(model, plan, tmp_path / "out")

    made = loaded(folder)
    wanted = fxfuse.apply(model, plan, inner="eager")
    assert difference(made, wanted) < 1e-8
    assert made.config.num_hidden_layers == 3
    assert torch.equal(greedy(made), greedy(wanted))


def test_a_map_that_was_healed_in_the_place_of_an_attention_is_exported(tmp_path: Path) -> None:
    model = tiny("qwen3", head_dim=16)  # heads of 64 features in all, and a stream of 32: no projection fits
    plan = fxfuse.Plan(linear=attn(2), parallel=[mlp(1, 2)])
    fxfuse.apply(model, plan, inner="eager")
    with torch.no_grad():
        model.get_parameter("model.layers.2.self_attn.linear.weight").normal_(std=0.3)

    folder = fxfuse.export(model, plan, tmp_path / "out")

    made = loaded(folder)
    assert difference(made, model) < 1e-8
    assert torch.equal(greedy(made), greedy(model))


def test_there_is_a_layer_for_each_attention_and_caches_have_no_gaps(tmp_path: Path) -> None:
    folder = fxfuse.export(tiny("llama"), fxfuse.Plan(drop=attn(1, 3)), tmp_path / "out", check=False)

    made = loaded(folder)
    cache = made(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=True).past_key_values
    assert made.config.num_hidden_layers == len(made.model.layers) == 4
    assert [layer.get_seq_length() for layer in cache.layers] == [3] * 4


@pytest.mark.parametrize("edits", [PAIRS, BLOCKS, ENDS], ids=["pairs", "blocks", "ends"])
def test_one_number_at_most_is_in_the_path_of_an_attention(edits: dict[str, Any], tmp_path: Path) -> None:
    folder = fxfuse.export(tiny("llama"), fxfuse.Plan(**edits), tmp_path / "out", check=False)

    paths = [path for path, part in loaded(folder).named_modules() if type(part).__name__ == "LlamaAttention"]
    assert len(paths) > 2
    assert all(sum(name.isdigit() for name in path.split(".")) == 1 for path in paths)  # vLLM wants it so


def test_groups_of_ffns_are_one_wide_module(tmp_path: Path) -> None:
    folder = fxfuse.export(tiny("llama"), fxfuse.Plan(**FUSED), tmp_path / "out", check=False)

    widths = {part.up_proj.out_features for part in loaded(folder).modules() if type(part).__name__ == "GatedFFN"}
    assert widths == {120}
    per_layer = json.loads((folder / "per_layer_config.json").read_text())
    assert per_layer == {
        "1": {"intermediate_size": 120},
        "2": {"skip": ["attention", "mlp"]},
        "3": {"skip": ["attention", "mlp"]},
    }


def test_the_folder_needs_no_fxfuse(tmp_path: Path) -> None:
    folder = fxfuse.export(tiny("llama"), fxfuse.Plan(**FUSED), tmp_path / "out", check=False)
    code = (
        "import sys; sys.modules['fxfuse'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "print(type(model).__name__)"
    )

    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert told.stdout.strip() == "PlannedForCausalLM"


def test_without_trust_nobody_takes_the_folder_for_the_original(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = fxfuse.export(tiny("llama"), fxfuse.Plan(**FUSED), tmp_path / "out", check=False)

    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_a_pruned_model_exports_as_its_original_does(tmp_path: Path) -> None:
    plan = fxfuse.Plan(**FUSED)
    model = fxfuse.apply(tiny("llama"), plan, inner="eager")

    folder = fxfuse.export(model, plan, tmp_path / "out")

    assert difference(loaded(folder), planned(tiny("llama"), **FUSED)) < 1e-8
    assert json.loads((folder / "per_layer_config.json").read_text())["3"] == {"skip": ["attention", "mlp"]}


@pytest.mark.parametrize(
    ("family", "edits", "reason"),
    [
        ("llama", {"drop": attn(*range(6))}, "no attention"),
        ("gemma3", {"parallel": [attn(4, 5)]}, "layer_types differ"),
        ("moe", {"drop": ["model.layers.4.mlp.shared_experts"]}, "one module"),
    ],
)
def test_what_cannot_be_said_is_refused_before_a_byte_is_written(
    family: str, edits: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=reason):
        fxfuse.export(tiny(family), fxfuse.Plan(**edits), tmp_path / "out")

    assert not list(tmp_path.iterdir())
