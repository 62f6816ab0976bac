from __future__ import annotations

import pytest
import torch

from fxfuse import Plan
from fxfuse.errors import KernelError, OptionError
from fxfuse.hardware.cost import Layer, fused, sequential
from fxfuse.hardware.gpus import find
from fxfuse.hardware.times import USUAL
from fxfuse.planning.costs import Costs
from fxfuse.planning.modelled import model_costs
from tests.models.tiny import llama

ATTENTION, FFN = "model.layers.1.self_attn", "model.layers.1.mlp"


def costs(**options: object) -> Costs:
    return model_costs(llama(2, torch.float32), "h100", context=100, **options)  # type: ignore[arg-type]


class TestModelled:
    def test_an_ffn_costs_what_the_model_of_hardware_says(self) -> None:
        found, layer = costs(tp=2)[FFN], Layer(32, 40, 1, 2)
        assert found.seconds == sequential(layer, 1, find("h100")).seconds
        assert found.groups[:2] == (found.seconds, fused(layer, 2, find("h100")).seconds)
        assert found.parameters == (3 * 32 * 40 + 32) * 2

    def test_an_attention_keeps_keys_and_values_of_all_tokens(self) -> None:
        assert costs()[ATTENTION].cache == 2 * 2 * 8 * 101 * 2  # two of two heads of 8, 101 tokens, bfloat16
        assert costs(phase="prefill", batch=3)[ATTENTION].cache == 2 * 2 * 8 * 300 * 2

    def test_longer_contexts_and_prompts_take_longer(self) -> None:
        model = llama(1, torch.float32)
        short, long_ = (model_costs(model, "h100", context=n)["model.layers.0.self_attn"].seconds for n in (10, 10**6))
        read = (10**6 - 10) * 64 / (find("h100").bandwidth * USUAL.bandwidth)  # 64 bytes of keys and values a token
        assert long_ - short == pytest.approx(read, rel=1e-6)
        phases = [model_costs(model, "h100", context=10**4, phase=phase).whole for phase in ("decode", "prefill")]  # type: ignore[arg-type]
        assert phases[1] > phases[0]

    def test_a_plan_saves_time_by_them(self) -> None:
        found = costs(tp=2)
        assert found.modelled
        assert found.of(Plan(drop=[ATTENTION])).seconds == pytest.approx(found.whole - found[ATTENTION].seconds)
        assert 0 < found.gain(Plan(linear=[ATTENTION])).seconds < found[ATTENTION].seconds

    def test_blocks_in_parallel_save_all_reduces_of_several_gpus(self) -> None:
        window = Plan(parallel=[[(f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp") for n in (0, 1)]])
        assert costs().gain(window).seconds == 0
        found = costs(tp=2)
        assert found.gain(window).seconds == pytest.approx(found[FFN].reduction)
        assert 0 < found[FFN].reduction < found[FFN].seconds

    def test_nonsense_is_an_error(self) -> None:
        with pytest.raises(KernelError, match="no figures for a GPU 'abacus'"):
            model_costs(llama(1), "abacus")
        with pytest.raises(OptionError, match="tp"):
            costs(tp=0)
        with pytest.raises(OptionError, match="decode or prefill"):
            costs(phase="encode")
