"""Two processes train what one trains, each all of it, or under FSDP a part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from fxfuse import Plan
from fxfuse.errors import OptionError
from fxfuse.healing.distill import distill
from tests.models.language import EDITS, language, sentences

STEPS = 4


def fsdp_on_cpus() -> None:
    """Let accelerate do with processes on CPUs what it does with those on GPUs: with these it leaves FSDP out."""
    initialise = AcceleratorState.__init__

    def initialise_as_on_gpus(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("fsdp_plugin") is not None and not AcceleratorState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialise(self, *args, **kwargs)

    AcceleratorState.__init__ = initialise_as_on_gpus  # type: ignore[method-assign]


class Held(TrainerCallback):
    """How many numbers of what is trained this process holds while it is."""

    def __init__(self) -> None:
        self.counts: set[int] = set()

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        held = [each.to_local() if isinstance(each, DTensor) else each for each in model.parameters()]
        self.counts.add(sum(each.numel() for each in held))


def main(folder: Path, way: str) -> None:
    """What each process runs; a process alone takes two batches a step, two processes one each."""
    world, top_k, held = int(os.environ.get("WORLD_SIZE", "1")), 3 if way == "top k" else None, Held()
    sharding: dict[str, Any] = {"fsdp": True} if way == "fsdp" and world > 1 else {}
    if sharding:
        fsdp_on_cpus()
    batches = sentences(2 * STEPS)
    batches[1]["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])  # shares of a step differ
    model = language()
    found = distill(
        model,
        Plan(**EDITS),
        batches,
        lr=3e-3,
        inner="eager",
        top_k=top_k,
        folder=folder if top_k else None,
        held_out=sentences(1, seed=9),
        use_cpu=True,
        gradient_accumulation_steps=2 // world,
        callbacks=[held],
        **sharding,
    )
    rank = os.environ.get("RANK", "0")
    torch.save(model.state_dict(), folder / f"{world}-{rank}.pt")
    results = [found.stages[0].losses, found.kl, found.kept, *held.counts]
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
    if way == "live" and world > 1:
        with pytest.raises(OptionError, match="shards nothing on CPUs"):
            distill(language(), Plan(**EDITS), batches, inner="eager", use_cpu=True, fsdp=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["live", "top k", "fsdp"])
def test_two_processes_have_the_loss_curve_and_the_weights_of_one(tmp_path: Path, way: str) -> None:
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000), "WORLD_SIZE": str(world)}
        environment = os.environ | own | {"OMP_NUM_THREADS": "1"}
        if world == 1:
            environment = {name: value for name, value in environment.items() if name not in own}
        command = [sys.executable, "-m", "tests.healing.test_processes", str(folder), way]
        running = [
            subprocess.Popen(command, env=environment | ({"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {}))
            for r in range(world)
        ]
        try:
            assert [process.wait(600) for process in running] == [0] * world
        finally:
            for process in running:
                process.kill()

    made = [tmp_path / name[0] / name for name in ("1-0", "2-0", "2-1")]
    one, *two = ([json.loads(path.with_suffix(".json").read_text()), torch.load(f"{path}.pt")] for path in made)
    assert len(one[0][0]) == STEPS and one[0][2]
    for losses, weights in two:
        assert losses[3] == pytest.approx(one[0][3] / (2 if way == "fsdp" else 1), rel=0.02)
        assert losses[0] == pytest.approx(one[0][0], abs=1e-4)
        assert losses[1] == pytest.approx(one[0][1], abs=1e-6)
        for name, value in one[1].items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6, msg=name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
