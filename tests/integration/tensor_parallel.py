"""What each process of `test_tensor_parallel.py` runs: models that are sharded, planned, compiled, and compared.

RANK=0 WORLD_SIZE=2 python -m tests.integration.tensor_parallel FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import register_backend

import fxfuse
from fxfuse import Plan
from fxfuse.backend.agreement import agree
from fxfuse.backend.frontend import capture
from fxfuse.errors import PlanError
from tests.models.sharded import How, decoder, shard, tokens

FUSED = Plan(drop=["layers.1.attn", "layers.2.attn"], parallel=[["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]])
PAIRS = Plan(parallel=[["layers.1.attn", "layers.2.attn"], ["layers.1.mlp", "layers.2.mlp"]])


@dataclass(frozen=True)
class Case:
    """One model under one plan, and how many all-reduces are to be left of its eight."""

    how: How
    plan: Plan
    left: int
    f: int = 24
    beside: bool = False
    inner: str = "counted"


CASES = {
    "as it is": Case("dtensor", Plan(), 8),
    "a wide FFN": Case("dtensor", FUSED, 4),
    "pairs of branches": Case("dtensor", PAIRS, 6),
    "attention beside FFN, biases": Case("dtensor", Plan(), 4, beside=True),
    "attention beside FFN, biases, a wide FFN": Case("dtensor", FUSED, 3, beside=True),
    "shards of an odd width": Case("dtensor", FUSED, 4, f=20),
    "DTensors between projections": Case("whole outputs", FUSED, 4),
    "functional collectives": Case("functional", FUSED, 4),
    "collectives in place": Case("in place", FUSED, 4),
    "collectives in place, as it is": Case("in place", Plan(), 8),
    "inductor": Case("dtensor", FUSED, 0, inner="inductor"),
}

counted: list[int] = []


@register_backend(name="counted")
def count_reductions(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> object:
    """Runs the aten graph as it is, and counts its all-reduces."""

    def forward(graph: fx.GraphModule, _: list[torch.Tensor]) -> object:
        counted.append(sum("all_reduce" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    return aot_autograd(fw_compiler=forward)(gm, inputs)


def run(case: Case) -> tuple[float, int]:
    """How far the sharded model is from the planned one in one process, and its all-reduces."""
    model, x = decoder(f=case.f, beside=case.beside), tokens()
    torch.compiler.reset()
    counted.clear()
    with torch.no_grad():
        expected = model.planned(x, case.plan.drop, case.plan.parallel)
        options = {"plan": case.plan, "inner": case.inner}
        compiled = torch.compile(shard(model, case.how), backend="ffnfuse", options=options)
        return float((compiled(x) - expected).abs().max()), sum(counted)


def followed() -> float:
    """How far the sharded model is from one whose weights were written in the same way, after it was compiled."""
    model, same, x = decoder(), decoder(), tokens()
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(shard(model, "dtensor"), backend="ffnfuse", options={"plan": FUSED, "inner": "eager"})
        compiled(x)
        worst = 0.0
        for factor, x in ((2.0, tokens()), (0.5, tokens(11))):  # another length: sizes become symbols
            for made in (model, same):
                made.layers[1].mlp.gate.weight.mul_(factor)
                made.layers[2].mlp.down.weight.data.mul_(1 + factor)
            expected = same.planned(x, FUSED.drop, FUSED.parallel)
            worst = max(worst, float((compiled(x) - expected).abs().max()))
        return worst


def trained(how: How) -> tuple[float, float]:
    """How far loss and gradients are from those of one process."""
    model, same, x = decoder(), decoder(), tokens()
    torch.compiler.reset()
    expected = same.planned(x, FUSED.drop, FUSED.parallel).square().mean()
    expected.backward()
    compiled = torch.compile(shard(model, how), backend="ffnfuse", options={"plan": FUSED, "inner": "counted"})
    loss = compiled(x).square().mean()
    loss.backward()
    worst = 0.0
    for (name, weight), wanted in zip(model.named_parameters(), same.parameters(), strict=True):
        if wanted.grad is not None:
            assert weight.grad is not None, name
            grad = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
            worst = max(worst, float((grad - wanted.grad).abs().max()))
    return float((loss - expected).detach().abs()), worst


def along_the_sequence() -> float:
    """How far a model is that is also spread along the sequence: it has all-gathers, and the plan alone is applied."""
    model, x = decoder(), tokens(8)
    torch.compiler.reset()
    with torch.no_grad():
        expected = model.planned(x, FUSED.drop, FUSED.parallel)
        options = {"plan": FUSED, "inner": "eager"}
        compiled = torch.compile(shard(model, "sequence"), backend="ffnfuse", options=options)
        return float((compiled(x) - expected).abs().max())


def applied() -> tuple[float, list[str]]:
    """How far a model is that was sharded and then pruned and compiled in place; the attentions it still has."""
    model, x = decoder(), tokens()
    torch.compiler.reset()
    with torch.no_grad():
        expected = model.planned(x, FUSED.drop, FUSED.parallel)
        made = fxfuse.apply(shard(model, "dtensor"), FUSED, inner="eager", example=x)
        left = [name for name, _ in made.named_modules() if name.endswith("attn.q")]
        return float((made(x) - expected).abs().max()), left


def under_two_plans() -> str:
    """What the last process is told that compiles a model under another plan than the first."""
    (captured,) = capture(shard(decoder(3), "dtensor"), tokens())
    rank, names = dist.get_rank(), captured.names.values()
    told = ""
    for turn, plan in enumerate((FUSED, PAIRS)):
        if rank == turn:
            try:
                agree(captured.gm, plan, names)
            except PlanError as error:
                told = str(error)
        dist.barrier()
    return told


def refused() -> list[str]:
    """What is said of a sharded model where nobody could tell what it computes."""
    model, said = shard(decoder(2), "dtensor"), []
    linear = torch.compile(model, backend="ffnfuse", options={"plan": Plan(linear=["layers.1.attn"]), "inner": "eager"})
    calls: list[Callable[[], object]] = [
        lambda: linear(tokens()),
        lambda: fxfuse.record(model, [{"tokens": tokens()}]),
        lambda: fxfuse.heal(model, FUSED, [{"tokens": tokens()}]),
        lambda: fxfuse.export(model, FUSED, "nowhere", format="transformers"),
    ]
    for call in calls:
        try:
            with torch.no_grad():
                call()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def main(folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    cases = {name: case for name, case in CASES.items() if world == 2 or case.inner == "counted"}
    found: dict[str, object] = {name: run(case) for name, case in cases.items()}
    found["sequence"] = along_the_sequence()
    if world == 2:
        found |= {"followed": followed(), "trained": trained("dtensor"), "applied": applied()}
        found |= {"under two plans": under_two_plans(), "refused": refused()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
