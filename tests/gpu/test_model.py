"""A model under a plan, compiled where the GPU is, against the planned model in float64."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.models import with_backend
from fxfuse import Plan
from tests.gpu.here import DEVICE, INTERPRETED

PLAN = Plan(
    drop=[f"model.layers.{index}.self_attn" for index in (2, 3)],
    parallel=[[f"model.layers.{index}.mlp" for index in (1, 2, 3)]],
)


def relative(made: torch.Tensor, exact: torch.Tensor) -> float:
    return ((made.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("merge_gate_up", [True, False], ids=["merged", "not merged"])
def test_a_planned_model_is_as_exact_as_plain_torch(tokens: int, merge_gate_up: bool) -> None:
    with_backend()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).eval().to(DEVICE, torch.bfloat16)
    ids = torch.randint(128, (2, tokens), device=DEVICE)
    inner = "aot_eager" if INTERPRETED else "inductor"
    eager = {"plan": PLAN, "inner": "eager", "kernels": "aten"}
    own = {"plan": PLAN, "inner": inner, "kernels": "fxfuse", "merge_gate_up": merge_gate_up}

    def logits(options: dict[str, object]) -> torch.Tensor:
        torch._dynamo.reset()
        with torch.no_grad():
            return torch.compile(model, backend="ffnfuse", options=options)(ids, use_cache=False).logits

    made, plain = logits(own), logits(eager)
    model.double()
    exact = logits(eager)
    assert relative(made, exact) <= 2 * relative(plain, exact) + torch.finfo(torch.bfloat16).eps
