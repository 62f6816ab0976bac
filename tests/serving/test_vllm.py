from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxfuse
from benchmarks.serving.plans import PLANS
from fxfuse.bench.engines.process import Settings, serving
from fxfuse.data.loading import Loaded, load
from fxfuse.data.text import python_documentation
from tests.models.tiny import planned
from tests.serving.conftest import PYTHON

TOKENS = 16


@pytest.fixture(scope="module")
def prompts(smollm2: Callable[[torch.dtype], Loaded]) -> list[list[int]]:
    """32 beginnings of 8 to 39 tokens, from all over a text."""
    tokenizer = smollm2(torch.float32).tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(python_documentation("hold out")[:40_000])
    return [ids[97 * index : 97 * index + 8 + index] for index in range(32)]


@pytest.mark.parametrize(
    ("name", "form", "implementation"),
    [
        ("dropped", "transformers", "transformers"),
        ("fused", "nemotron-nas", "auto"),
        ("fused", "transformers", "transformers"),
        ("pairs", "transformers", "transformers"),
        ("blocks", "transformers", "transformers"),
    ],
)
def test_vllm_says_what_the_planned_model_says(
    name: str, form: str, implementation: str, smollm2_folder: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    loaded = load(str(smollm2_folder))
    folder = fxfuse.export(loaded.model, PLANS[name], tmp_path / "out", form, loaded.tokenizer)

    settings = Settings(implementation=implementation, dtype="float32")
    with serving("vllm", folder, tmp_path / "log", PYTHON, settings) as served:
        made = served.generate(prompts, TOKENS)

    wanted = planned(loaded.model, PLANS[name].drop, PLANS[name].parallel)
    assert made == [greedy(wanted, prompt) for prompt in prompts]


def test_vllm_applies_a_plan_to_a_checkpoint_while_it_loads_it(
    smollm2_folder: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    PLANS["fused"].save(tmp_path / "plan.json")

    settings = Settings(dtype="float32", plan=str(tmp_path / "plan.json"))
    with serving("vllm", smollm2_folder, tmp_path / "log", PYTHON, settings) as served:
        made = served.generate(prompts, TOKENS)

    assert "DeciLMForCausalLM" in served.served.description
    wanted = planned(load(str(smollm2_folder)).model, PLANS["fused"].drop, PLANS["fused"].parallel)
    assert made == [greedy(wanted, prompt) for prompt in prompts]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """What the planned model says."""
    made = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    return made[0, len(prompt) :].tolist()
