from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fxfuse import Plan
from fxfuse.bench import branches as module
from fxfuse.bench.timing import Samples
from fxfuse.errors import OptionError, PlanError, RecordError
from fxfuse.planning.costs import Costs, Use, measure_costs
from tests.healing.test_own_maps import qwen3
from tests.models.checks import assert_exact
from tests.models.tiny import llama, planned, tokens
from tests.planning.costs import costs_of
from tests.planning.recordings import recording


class Gated(nn.Module):
    """A norm times what is projected of it: no linear map comes after one."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.gate = nn.Linear(32, 32, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        return normed * torch.sigmoid(self.gate(normed))


class TestSavings:
    def test_they_add_up(self) -> None:
        costs = costs_of(recording("afafaf"))
        assert costs.original == Use(10.0, 6500.0 + 192, 192.0)
        assert costs.of(Plan(drop=["a0", "f0"])) == Use(7.0, 4500.0 + 128, 128.0)
        assert costs.of(Plan(linear=["a0"])) == Use(10.0 - 0.75, 6500.0 - 700 + 128, 128.0)

    def test_a_larger_group_than_was_measured_goes_on_saving_what_the_last_member_did(self) -> None:
        costs = costs_of(recording("fffff"))
        names = [f"f{k}" for k in range(5)]
        assert costs.gain(Plan(parallel=[names[:2]])).seconds == pytest.approx(0.5)
        assert costs.gain(Plan(parallel=[names[:3]])).seconds == pytest.approx(1.25)
        assert costs.gain(Plan(parallel=[names])).seconds == pytest.approx(1.25 + 2 * 0.75)

    def test_groups_that_are_no_wide_ffn_save_nothing(self) -> None:
        costs = costs_of(recording("afaf"))
        assert costs.gain(Plan(parallel=[["a0", "a1"]])) == Use()
        assert costs.gain(Plan(parallel=[[("a0", "f0"), ("a1", "f1")]])) == Use()

    def test_a_narrowed_ffn_saves_what_its_units_would_add_to_another_one(self) -> None:
        costs = costs_of(recording("afaf"))
        gain = costs.gain(Plan(narrow={"f0": range(4)}))
        assert gain == Use(pytest.approx(0.6 * 1.5), 6 * 90, 0)  # 6 of 10, and 3.5 - 2 seconds
        assert costs.gain(Plan(narrow={"f0": range(10)})) == Use()
        both = Plan(narrow={"f0": range(5)}, parallel=[["f0", "f1"]])
        assert costs.gain(both).seconds == pytest.approx(0.5 + 0.75)

    def test_a_name_without_costs_is_an_error(self) -> None:
        costs = costs_of(recording("af"), no_map=("a0",))
        with pytest.raises(PlanError, match="no costs of a branch 'b0'"):
            costs.of(Plan(drop=["b0"]))
        with pytest.raises(PlanError, match="none fits"):
            costs.of(Plan(linear=["a0"]))
        with pytest.raises(PlanError, match="'a0' has no costs as a narrowed FFN"):
            costs.of(Plan(narrow={"a0": [0]}))


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    costs = costs_of(recording("afaf"))
    costs.save(tmp_path / "costs.json")
    assert Costs.load(tmp_path / "costs.json") == costs
    (tmp_path / "costs.json").write_text('{"whole": 1')
    with pytest.raises(RecordError, match="measure them again"):
        Costs.load(tmp_path / "costs.json")


class TestMeasured:
    @pytest.fixture(scope="class")
    def costs(self) -> Costs:
        return measure_costs(llama(3), tokens(2, 8), max_group=2, inner="eager", repeats=1)

    def test_every_branch_has_a_time_and_its_bytes(self, costs: Costs) -> None:
        model = llama(3)
        layer = model.model.layers[1]
        own = costs["model.layers.1.mlp"]
        weights = [*layer.mlp.parameters(), *layer.post_attention_layernorm.parameters()]
        assert own.parameters == sum(p.numel() * p.element_size() for p in weights)
        attention = costs["model.layers.1.self_attn"]
        key = layer.self_attn.k_proj.weight
        assert (
            attention.cache == 2 * 2 * 9 * key.shape[0] * key.element_size()
        )  # keys, values; 2 sequences; 8 tokens + 1
        assert attention.linear_parameters < attention.parameters
        assert [len(branch.groups) for branch in costs.branches] == [0, 2] * 3
        assert all(all(time > 0 for time in branch.groups) for branch in costs.branches)

    def test_a_map_is_timed_too_where_no_projection_of_the_model_can_be_one(self) -> None:
        model = qwen3(torch.float32)
        costs = measure_costs(model, tokens(2, 8), max_group=1, inner="eager", repeats=1)
        norm = model.model.layers[1].input_layernorm.weight
        for layer in range(3):
            own = costs[f"model.layers.{layer}.self_attn"]
            assert own.linear is not None and own.linear > 0
            assert own.linear_parameters == (32 * 32 + norm.numel()) * 4

    def test_an_attention_that_cannot_be_linear_takes_no_map_from_the_others(self) -> None:
        model = llama(3)
        model.model.layers[1].input_layernorm = Gated(model.model.layers[1].input_layernorm)
        costs = measure_costs(model, tokens(2, 8), max_group=1, inner="eager", repeats=1)
        maps = [costs[f"model.layers.{layer}.self_attn"].linear for layer in range(3)]
        assert maps[1] is None
        assert maps[0] is not None and maps[0] == maps[2] > 0

    def test_branches_of_one_shape_are_measured_once(self, costs: Costs) -> None:
        assert len({branch.seconds for branch in costs.branches}) == 2

    @pytest.mark.parametrize("phase", ["decode", "prefill"])
    def test_a_branch_takes_what_the_model_takes_less_without_it(
        self, phase: Literal["decode", "prefill"], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, ids = llama(4), tokens(2, 8)
        given = ids if phase == "prefill" else torch.cat([ids, ids[:, -1:]], 1)
        kept = {"kind 0": "self_attn", "kind 1": "mlp"}
        taken: dict[str, float] = {}

        def interleave(calls: Mapping[str, Callable[[], object]], *_: object) -> Samples:
            for name, call in calls.items():
                taken[name] = 1.0
                if name.startswith("the "):
                    made: Any = call()
                    kind = kept.get(name.rpartition("half of ")[2])
                    halved = [f"model.layers.{n}.{kind}" for n in (1, 3)] if kind else []
                    with torch.no_grad():
                        right = planned(model, halved)(input_ids=given, use_cache=False).logits
                    assert_exact([made.logits[:, -1]], [right[:, -1]])
                    taken[name] = 10.0 - 1.5 * len(halved)
            return Samples({name: (seconds,) for name, seconds in taken.items()})

        monkeypatch.setattr(module, "interleave", interleave)
        costs = measure_costs(model, ids, phase, max_group=2, inner="eager", repeats=1)
        assert sum(name.startswith("the ") for name in taken) == 3
        assert [branch.seconds for branch in costs.branches] == pytest.approx([1.5] * 8)

    def test_the_phase_is_one_of_two(self) -> None:
        with pytest.raises(OptionError, match="decode or prefill"):
            measure_costs(llama(1), torch.zeros(1, 4, dtype=torch.int64), "encode")  # type: ignore[arg-type]
