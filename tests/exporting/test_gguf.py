from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import fxfuse
from fxfuse.data.loading import smollm2_path
from fxfuse.errors import ExportError, OptionError
from tests.exporting.families import LAYERS, VOCABULARY, tiny

DROP = ["model.layers.2.self_attn", "model.layers.3.self_attn"]
PLAN = fxfuse.Plan(drop=DROP, parallel=[["model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3.mlp"]])


def written(family: str, plan: fxfuse.Plan, folder: Path, **options: Any) -> GGUFReader:
    return GGUFReader(fxfuse.export(tiny(family, torch.float32), plan, folder, "gguf", **options) / "model.gguf")


def fields(reader: GGUFReader) -> dict[str, Any]:
    return {key.removeprefix("deci."): field.contents() for key, field in reader.fields.items()}


def tensors(reader: GGUFReader) -> dict[str, Tensor]:
    return {each.name: torch.from_numpy(np.copy(dequantize(each.data, each.tensor_type))) for each in reader.tensors}


def test_layers_have_heads_and_widths_of_their_own(tmp_path: Path) -> None:
    told = fields(written("llama", PLAN, tmp_path / "out"))

    assert told["general.architecture"] == "deci"
    assert told["block_count"] == 4  # of six layers, two have lost their attention, and their FFNs to the one before
    assert told["attention.head_count"] == [4] * 4
    assert told["attention.head_count_kv"] == [2] * 4
    assert told["feed_forward_length"] == [64, 128, 64, 64]  # 40 and 120, filled up to multiples of 32
    assert told["rope.dimension_count"] == told["attention.key_length"] == 8
    assert told["tokenizer.ggml.model"] == "no_vocab"


def test_a_wide_ffn_has_its_members_weights_then_zeros(tmp_path: Path) -> None:
    model, held = tiny("llama", torch.float32), tensors(written("llama", PLAN, tmp_path / "out"))

    layers = [model.model.layers[index] for index in (1, 2, 3)]
    gain = torch.cat([layer.mlp.up_proj.weight * layer.post_attention_layernorm.weight for layer in layers])
    assert torch.equal(held["blk.1.ffn_norm.weight"], torch.ones(32))
    torch.testing.assert_close(held["blk.1.ffn_up.weight"][:120], gain)
    assert held["blk.1.ffn_up.weight"][120:].eq(0).all()
    down = torch.cat([layer.mlp.down_proj.weight for layer in layers], 1)
    assert torch.equal(held["blk.1.ffn_down.weight"][:, :120], down)
    assert held["blk.1.ffn_down.weight"][:, 120:].eq(0).all()


def test_features_that_are_turned_together_lie_side_by_side(tmp_path: Path) -> None:
    model, held = tiny("llama", torch.float32), tensors(written("llama", PLAN, tmp_path / "out"))

    own, made = model.model.layers[0].self_attn.k_proj.weight, held["blk.0.attn_k.weight"]
    order = [head * 8 + half * 4 + pair for head in range(2) for pair in range(4) for half in range(2)]
    assert torch.equal(made, own[order])
    assert torch.equal(held["blk.0.attn_v.weight"], model.model.layers[0].self_attn.v_proj.weight)


def test_an_attention_without_an_ffn_gets_one_of_zeros(tmp_path: Path) -> None:
    """llama.cpp throws the attention of such a layer away."""
    reader = written("llama", fxfuse.Plan(drop=["model.layers.2.mlp"]), tmp_path / "out")

    assert fields(reader)["feed_forward_length"] == [64, 64, 32, 64, 64, 64]
    assert all(tensors(reader)[f"blk.2.ffn_{part}.weight"].eq(0).all() for part in ("gate", "up", "down"))


def test_a_first_layer_without_attention_gets_a_linear_map_of_zeros(tmp_path: Path) -> None:
    """llama.cpp reads no rotary angles where the first layer has no heads."""
    reader = written("llama", fxfuse.Plan(drop=["model.layers.0.self_attn"]), tmp_path / "out")

    assert fields(reader)["attention.head_count"] == [4] * 6
    assert fields(reader)["attention.head_count_kv"] == [0, *[2] * 5]
    assert tensors(reader)["blk.0.attn_output.weight"].eq(0).all()


def test_a_linear_attention_is_a_norm_and_an_output_projection(tmp_path: Path) -> None:
    reader = written("llama", fxfuse.Plan(linear=["model.layers.4.self_attn"]), tmp_path / "out")

    assert fields(reader)["attention.head_count"] == [4] * 6
    assert fields(reader)["attention.head_count_kv"] == [2, 2, 2, 2, 0, 2]
    own = tiny("llama", torch.float32).model.layers[4]
    held = {name.removeprefix("blk.4."): value for name, value in tensors(reader).items() if "blk.4.attn" in name}
    assert held.keys() == {"attn_norm.weight", "attn_output.weight"}
    assert torch.equal(held["attn_output.weight"], own.self_attn.o_proj.weight)


def test_a_tied_head_is_not_written_again(tmp_path: Path) -> None:
    assert "output.weight" not in tensors(written("biased", PLAN, tmp_path / "tied"))
    assert "output.weight" in tensors(written("llama", PLAN, tmp_path / "untied"))


@pytest.mark.parametrize(("kind", "error"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2)])
def test_matrices_have_the_type_that_was_asked_for(kind: str, error: float, tmp_path: Path) -> None:
    reader, exact = written("biased", PLAN, tmp_path / kind, type=kind), written("biased", PLAN, tmp_path / "exact")

    kinds = {each.name: each.tensor_type for each in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == GGMLQuantizationType[kind.upper()]
    assert kinds["blk.0.ffn_norm.weight"] == kinds["blk.0.attn_q.bias"] == GGMLQuantizationType.F32
    for name, value in tensors(reader).items():
        assert (value - tensors(exact)[name]).abs().max() <= error * tensors(exact)[name].abs().max(), name


@pytest.mark.parametrize(
    ("family", "plan", "reason"),
    [
        ("qwen3", PLAN, "QK-norm"),
        ("gemma3", PLAN, "post-norm"),
        ("biased", fxfuse.Plan(linear=["model.layers.1.self_attn"]), "linear map with a bias"),
        ("llama", fxfuse.Plan(drop=[f"model.layers.{index}.self_attn" for index in range(LAYERS)]), "no attention"),
        ("llama", fxfuse.Plan(parallel=[["model.layers.1.self_attn", "model.layers.2.self_attn"]]), "side by side"),
    ],
)
def test_what_llama_cpp_cannot_say_is_refused_before_a_byte_is_written(
    family: str, plan: fxfuse.Plan, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=reason):
        written(family, plan, tmp_path / "out")

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"type": "q4_k"}, "q8_0"), ({"kind": "f16"}, "no option 'kind'"), ({"vocabulary": 1}, "path")],
)
def test_options_are_checked(options: Mapping[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=reason):
        written("llama", PLAN, tmp_path / "out", **options)


def test_rotary_angles_of_another_kind_are_refused(tmp_path: Path) -> None:
    model = tiny("llama", torch.float32)
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}

    with pytest.raises(ExportError, match="yarn"):
        fxfuse.export(model, PLAN, tmp_path / "out", "gguf")


def bpe(pre_tokenizer: object, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of eight tokens, the last of them added."""
    tokens = ["a", "b", "c", "Ġ", "ab", "abc", "Ġa"]
    model = models.BPE({token: place for place, token in enumerate(tokens)}, [("a", "b"), ("ab", "c"), ("Ġ", "a")])
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    made.add_tokens(["<tool>"])
    return made


def test_a_tokenizer_of_byte_level_bpe_is_written(tmp_path: Path) -> None:
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    told = fields(written("llama", PLAN, tmp_path / "out", tokenizer=bpe(split, eos_token="<end>")))

    assert told["tokenizer.ggml.model"] == "gpt2"
    assert told["tokenizer.ggml.pre"] == "smollm"
    assert told["tokenizer.ggml.tokens"][:10] == ["a", "b", "c", "Ġ", "ab", "abc", "Ġa", "<end>", "<tool>", "[PAD9]"]
    assert told["tokenizer.ggml.token_type"] == [*[1] * 7, 3, 4, *[5] * (VOCABULARY - 9)]
    assert told["tokenizer.ggml.merges"] == ["a b", "ab c", "Ġ a"]
    assert told["tokenizer.ggml.eos_token_id"] == 7
    assert told["tokenizer.ggml.add_bos_token"] is False
    assert "tokenizer.ggml.bos_token_id" not in told


def test_a_tokenizer_that_splits_in_a_way_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="none of llama.cpp's ways"):
        written("llama", PLAN, tmp_path / "out", tokenizer=bpe(pre_tokenizers.Whitespace()))


def test_a_vocabulary_is_taken_from_a_file_only_if_it_fits(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="49152 tokens, and the model 64"):
        written("llama", PLAN, tmp_path / "out", vocabulary=smollm2_path())
