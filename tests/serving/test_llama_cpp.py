from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxfuse
from benchmarks.serving.plans import PLANS
from fxfuse.bench.engines.process import Settings, serving
from fxfuse.data.loading import Loaded, smollm2_path
from fxfuse.data.text import python_documentation
from tests.exporting.families import tiny, tokens
from tests.models.tiny import planned
from tests.serving.conftest import LLAMA_PYTHON

LAYER = "model.layers.{}."
DROP = ["model.layers.2.self_attn", "model.layers.3.self_attn"]
WIDE = [["model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3.mlp"]]


def answers(folder: Path, prompts: Sequence[Sequence[int]], count: int, log: Path) -> tuple[list[list[int]], Tensor]:
    """What llama.cpp says after the prompts, and its logits of the first of them."""
    with serving("llama.cpp", folder, log / "log", LLAMA_PYTHON, Settings(threads=1)) as served:
        made = served.generate(prompts, count)
        served.write_logits(prompts[:1], log / "logits.npy")
    return made, torch.from_numpy(np.load(log / "logits.npy"))


@torch.no_grad()
def greedy(model: nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def llama3(model: Any) -> Any:
    """The same model with rotary angles that are stretched."""
    parameters = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    config = type(model.config)(**{**model.config.to_dict(), "rope_parameters": parameters})
    made = type(model)(config).to(torch.float32).eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize(
    ("family", "drop", "parallel"),
    [
        ("llama", DROP, WIDE),
        ("biased", DROP, WIDE),
        ("qwen2", DROP, WIDE),
        ("phi3", DROP, WIDE),
        ("granite", DROP, WIDE),
        ("llama3", DROP, WIDE),
        ("llama", ["model.layers.0.self_attn"], WIDE),  # the first layer has no attention
        ("llama", ["model.layers.2.mlp", "model.layers.5.mlp"], []),  # attentions with no FFN after them
        ("llama", ["model.layers.5.self_attn"], []),  # the last layer has no attention
    ],
)
def test_llama_cpp_computes_what_the_planned_model_does(
    family: str, drop: list[str], parallel: list[list[str]], tmp_path: Path
) -> None:
    model = llama3(tiny("llama", torch.float32)) if family == "llama3" else tiny(family, torch.float32)
    prompt = tokens(1, 40)[0].tolist()

    folder = fxfuse.export(model, fxfuse.Plan(drop=drop, parallel=parallel), tmp_path / "out", "gguf")
    made, logits = answers(folder, [prompt], 12, tmp_path)

    wanted = planned(model, drop, parallel)
    exact = wanted(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].detach()
    assert (logits - exact).abs().max() < 1e-4 * exact.abs().max()
    assert (logits - model(input_ids=torch.tensor([prompt])).logits[0]).abs().max() > 1e-2 * exact.abs().max()
    assert made == [greedy(wanted, prompt, 12)]


def test_llama_cpp_reads_linear_attentions(tmp_path: Path) -> None:
    model = tiny("llama", torch.float32)
    prompt = tokens(1, 20)[0].tolist()
    plan = fxfuse.Plan(linear=["model.layers.1.self_attn", "model.layers.5.self_attn"])

    folder = fxfuse.export(model, plan, tmp_path / "out", "gguf")
    made, logits = answers(folder, [prompt], 12, tmp_path)

    for index in (1, 5):  # the output projection of the norm, and nothing else
        attention = model.model.layers[index].self_attn
        attention.forward = lambda hidden_states, o=attention.o_proj, **_: (o(hidden_states), None)
    exact = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].detach()
    assert (logits - exact).abs().max() < 1e-4 * exact.abs().max()
    assert made == [greedy(model, prompt, 12)]


@pytest.mark.parametrize(("kind", "most"), [("f32", 1e-6), ("f16", 1e-3), ("q8_0", 0.05)])
def test_llama_cpp_serves_smollm2_under_a_plan(
    kind: str, most: float, smollm2: Callable[[torch.dtype], Loaded], tmp_path: Path
) -> None:
    """``most``: KL to the planned model, in nats per token; in float32 it also says the same."""
    loaded, plan = smollm2(torch.float32), PLANS["fused"]
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.encode(python_documentation("hold out")[:40_000])
    prompts = [ids[97 * index : 97 * index + 8 + index] for index in range(32 if kind == "f32" else 0)]
    text = ids[5000:5256]

    folder = fxfuse.export(loaded.model, plan, tmp_path / "out", "gguf", type=kind, vocabulary=smollm2_path())
    made, logits = answers(folder, [text, *prompts], 16, tmp_path)

    wanted = planned(loaded.model, plan.drop, plan.parallel)
    with torch.no_grad():
        exact = wanted(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    one, other = exact.double().log_softmax(-1), logits.double().log_softmax(-1)
    kl = float((one.exp() * (one - other)).sum(-1).mean())
    print(f"{kind}: KL {kl:.3g} nats per token")
    assert kl < most
    assert made[1:] == [greedy(wanted, prompt, 16) for prompt in prompts]
