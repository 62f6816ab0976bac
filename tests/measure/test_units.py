"""What hidden units are good for is recorded, and tells which of them an FFN keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import fxfuse
from fxfuse import Plan, Recording
from fxfuse.errors import OptionError, PlanError, RecordError
from fxfuse.measure.recording import FORMAT
from fxfuse.measure.units import narrowed
from tests.models.tiny import llama, tokens

MLPS = [f"model.layers.{layer}.mlp" for layer in range(3)]


def batches() -> list[dict[str, Any]]:
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    return [{"input_ids": tokens(2, 9, seed), "attention_mask": mask, "use_cache": False} for seed in (1, 2)]


@pytest.fixture(scope="module")
def recorded() -> Recording:
    return fxfuse.record(llama(3), batches(), max_group=0)


def by_hand(model: Any, layer: int) -> Tensor:
    """The mean over tokens that count of |activation|, times the length of the down projection's column."""
    seen: list[Tensor] = []
    down = model.model.layers[layer].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    handle.remove()
    counted = torch.cat([each[batch["attention_mask"].bool()] for each, batch in zip(seen, batches(), strict=True)])
    return counted.abs().mean(0) * down.weight.detach().norm(dim=0)


@pytest.mark.parametrize("layer", [0, 2])
def test_it_is_the_mean_activation_times_the_length_of_the_column(recorded: Recording, layer: int) -> None:
    found = recorded.units_of(MLPS[layer])

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_hand(llama(3), layer), rtol=1e-6, atol=0)


def test_a_file_holds_it_and_an_older_one_is_read_without(recorded: Recording, tmp_path: Path) -> None:
    path = tmp_path / "recording.safetensors"
    recorded.save(path)
    assert Recording.load(path).to_bytes() == recorded.to_bytes()
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[FORMAT])
        tensors = {name: file.get_tensor(name) for name in file.keys() if "units" not in name}  # noqa: SIM118
    del header["sha256"]
    save_file(tensors, path, {FORMAT: json.dumps(header)})

    old = Recording.load(path)

    assert torch.equal(old.kl, recorded.kl)
    with pytest.raises(RecordError, match="says nothing of the hidden units of 'model.layers.0.mlp': record again"):
        narrowed(old, MLPS[0], 0.5)


def test_a_recording_that_was_interrupted_has_the_same(recorded: Recording, tmp_path: Path) -> None:
    state = tmp_path / "state"
    fxfuse.record(llama(3), batches()[:1], max_group=0, resume=state)

    resumed = fxfuse.record(llama(3), batches(), max_group=0, resume=state)

    assert {name: each.tolist() for name, each in resumed.units.items()} == {
        name: each.tolist() for name, each in recorded.units.items()
    }


class TestNarrowed:
    def test_the_best_are_kept_in_their_order(self, recorded: Recording) -> None:
        best = by_hand(llama(3), 1).topk(10).indices.sort().values.tolist()

        assert narrowed(recorded, MLPS[1], 10) == narrowed(recorded, MLPS[1], 0.25) == tuple(best)
        assert narrowed(recorded, MLPS[1], 40) == tuple(range(40))

    def test_a_narrowed_ffn_keeps_some_of_those_that_it_kept(self, recorded: Recording) -> None:
        first = narrowed(recorded, MLPS[1], 10)
        again = fxfuse.record(llama(3), batches(), Plan(narrow={MLPS[1]: first}), max_group=0)

        torch.testing.assert_close(again.units_of(MLPS[1]), recorded.units_of(MLPS[1])[list(first)])
        assert narrowed(again, MLPS[1], 4) == narrowed(recorded, MLPS[1], 4)

    @pytest.mark.parametrize("keep", [0, 41, -1, 1.5, 0.0, True])
    def test_a_number_out_of_range_is_refused(self, recorded: Recording, keep: float) -> None:
        with pytest.raises(OptionError, match="1 to 40"):
            narrowed(recorded, MLPS[1], keep)

    def test_what_is_no_ffn_has_no_units(self, recorded: Recording) -> None:
        with pytest.raises(PlanError, match="is no FFN whose hidden units are told apart"):
            narrowed(recorded, "model.layers.0.self_attn", 1)

    def test_equal_units_keep_their_order(self, recorded: Recording) -> None:
        flat = replace(recorded, units={MLPS[0]: torch.ones(40)})
        assert narrowed(flat, MLPS[0], 3) == (0, 1, 2)
