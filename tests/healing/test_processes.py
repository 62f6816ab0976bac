"""Two processes train what one trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxfuse import Plan
from fxfuse.healing.distill import distill
from tests.models.language import EDITS, language, sentences

STEPS = 4


def main(folder: Path, top_k: int | None) -> None:
    """What each process runs; a process alone takes two batches a step, two processes one each."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
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
    )
    rank = os.environ.get("RANK", "0")
    torch.save(model.state_dict(), folder / f"{world}-{rank}.pt")
    (folder / f"{world}-{rank}.json").write_text(json.dumps([found.stages[0].losses, found.kl, found.kept]))


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [None, 3])
def test_two_processes_have_the_loss_curve_and_the_weights_of_one(tmp_path: Path, top_k: int | None) -> None:
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000), "WORLD_SIZE": str(world)}
        environment = os.environ | own | {"OMP_NUM_THREADS": "1"}
        if world == 1:
            environment = {name: value for name, value in environment.items() if name not in own}
        command = [sys.executable, "-m", "tests.healing.test_processes", str(folder), str(top_k or 0)]
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
        assert losses[0] == pytest.approx(one[0][0], abs=1e-4)
        assert losses[1] == pytest.approx(one[0][1], abs=1e-6)
        for name, value in one[1].items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6, msg=name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) or None)
