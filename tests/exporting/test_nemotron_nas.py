from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fxfuse
from fxfuse.errors import ExportError
from tests.exporting.families import difference, greedy, loaded, tiny
from tests.models.tiny import planned

LAYER = "model.layers.{}."
DROP = ["model.layers.2.self_attn", "model.layers.3.self_attn"]
WIDE = [["model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3.mlp"]]
PLAN = fxfuse.Plan(drop=DROP, parallel=WIDE)


@pytest.mark.parametrize("family", ["llama", "biased", "qwen2", "phi3", "granite"])
def test_a_folder_computes_what_the_planned_model_does(family: str, tmp_path: Path) -> None:
    model = tiny(family)

    folder = fxfuse.export(model, PLAN, tmp_path / "out", "nemotron-nas")

    made, wanted = loaded(folder), planned(model, DROP, WIDE)
    assert difference(made, wanted) < 1e-8
    assert difference(made, model) > 1e-3
    assert torch.equal(greedy(made), greedy(wanted))


def test_layers_without_anything_are_gone_and_widths_are_multiples_of_256(tmp_path: Path) -> None:
    folder = fxfuse.export(tiny("llama"), PLAN, tmp_path / "out", "nemotron-nas", check=False)

    config = json.loads((folder / "config.json").read_text())
    blocks = config["block_configs"]
    assert config["num_hidden_layers"] == len(blocks) == 4
    assert [block["attention"]["no_op"] for block in blocks] == [False] * 4
    widths = [int(2 * block["ffn"]["ffn_mult"] * 32 / 3 + 255) // 256 * 256 for block in blocks]
    weights = loaded(folder).state_dict()
    assert widths == [weights[f"model.layers.{number}.mlp.up_proj.weight"].shape[0] for number in range(4)]
    assert weights["model.layers.1.mlp.up_proj.weight"][120:].eq(0).all()
    assert weights["model.layers.1.mlp.up_proj.weight"][:120].ne(0).all()


@pytest.mark.parametrize(
    ("family", "plan", "reason"),
    [
        ("qwen3", PLAN, "QK-norm"),
        ("gemma3", PLAN, "sandwich or post-norm"),
        ("olmo2", PLAN, "post-norm"),
        ("moe", PLAN, "self_attn"),
        ("llama", fxfuse.Plan(drop=["model.layers.0.self_attn"]), "first layer"),
        ("llama", fxfuse.Plan(linear=["model.layers.1.self_attn"]), "linear map"),
        ("llama", fxfuse.Plan(parallel=[["model.layers.1.self_attn", "model.layers.2.self_attn"]]), "side by side"),
        ("llama", fxfuse.Plan(parallel=[[["model.layers.1.self_attn", "model.layers.1.mlp"],
                                        ["model.layers.2.self_attn", "model.layers.2.mlp"]]]), "one stream"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_say_is_refused_before_a_byte_is_written(
    family: str, plan: fxfuse.Plan, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=reason):
        fxfuse.export(tiny(family), plan, tmp_path / "out", "nemotron-nas")

    assert not list(tmp_path.iterdir())


def test_attentions_that_see_a_window_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.layer_types = ["full_attention"] * 5 + ["sliding_attention"]

    with pytest.raises(ExportError, match="sliding_attention"):
        fxfuse.export(model, PLAN, tmp_path / "out", "nemotron-nas")
