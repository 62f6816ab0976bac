"""transformers' own tensor parallelism (``tp_plan="auto"``): two processes compute what one does, a group reduces once.

Without gradients its linear layers run on the local parts of their weights, and call all-reduce themselves; with them
they run on DTensors. The embedding is spread too: one all-reduce more than there are branches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.tensor import DTensor

import fxfuse
from fxfuse import Plan
from tests.models.tiny import llama, planned, tokens

DROP = ["model.layers.1.self_attn", "model.layers.2.self_attn"]
GROUP = [["model.layers.1.mlp", "model.layers.2.mlp"]]
PLANS = {
    "as it is": (Plan(), 9),
    "two dropped": (Plan(drop=DROP), 7),
    "a wide FFN": (Plan(drop=DROP, parallel=GROUP), 6),
    "pairs of branches": (Plan(parallel=[DROP, *GROUP]), 7),
}
IDS = tokens(1)


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=config).eval()


def compiled(model: Any, plan: Plan) -> tuple[Any, list[int]]:
    """``model`` under ``plan``, and the all-reduces of each graph that is compiled."""
    counted: list[int] = []

    def count(gm: fx.GraphModule, _: object) -> Any:
        counted.append(sum("all_reduce" in str(node.target) for node in gm.graph.nodes))
        return gm.forward

    torch.compiler.reset()
    options: Any = {"plan": plan, "inner": aot_autograd(fw_compiler=count)}
    return torch.compile(model, backend="ffnfuse", options=options), counted


@torch.no_grad()
def computed(folder: Path, plan: Plan) -> tuple[float, int]:
    """How far the model of several processes is from that of one, and its all-reduces."""
    call, counted = compiled(loaded(folder), plan)
    made = call(input_ids=IDS, use_cache=False).logits
    one = planned(llama(), plan.drop, [list(group) for group in plan.parallel])
    return float((made - one(input_ids=IDS, use_cache=False).logits).abs().max()), sum(counted)


def trained(folder: Path) -> float:
    """How far its loss or a gradient is from those of one process."""
    model, one = loaded(folder), planned(llama(), DROP, GROUP)
    call, _ = compiled(model, PLANS["a wide FFN"][0])
    loss, wanted = (each(input_ids=IDS, use_cache=False, labels=IDS).loss for each in (call, one))
    loss.backward()
    wanted.backward()
    worst = float((loss - wanted).detach().abs())
    for (name, weight), same in zip(model.named_parameters(), one.parameters(), strict=True):
        if same.grad is not None:
            assert weight.grad is not None, name
            grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
            worst = max(worst, float((grad - same.grad).abs().max()))
    return worst


@torch.no_grad()
def generated(folder: Path) -> tuple[bool, list[str]]:
    """Whether the applied model of several processes writes what that of one writes; the attentions that are left."""
    torch.compiler.reset()
    model = fxfuse.apply(loaded(folder), PLANS["a wide FFN"][0], inner="eager")
    options: Any = {"max_new_tokens": 5, "do_sample": False}
    same = torch.equal(model.generate(IDS, **options), planned(llama(), DROP, GROUP).generate(IDS, **options))  # type: ignore[operator]  # a model of transformers
    return same, [name for name, _ in model.named_modules() if name.endswith("q_proj")]


def main(folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found: dict[str, object] = {name: computed(folder / "llama", plan) for name, (plan, _) in PLANS.items()}
    found |= {"trained": trained(folder / "llama"), "generated": generated(folder / "llama")}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_what_one_does_and_a_group_all_reduces_once(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "llama")
    command = [sys.executable, "-m", "tests.integration.test_tp_plan", str(tmp_path)]
    own = {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(command, env=os.environ | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [process.wait(900) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()

    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, (_, reductions) in PLANS.items():
            assert found[name][0] <= 1e-8, name
            assert found[name][1] == reductions, name
        assert found["trained"] <= 1e-8
        assert found["generated"] == [True, ["model.layers.0.self_attn.q_proj", "model.layers.3.self_attn.q_proj"]]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
