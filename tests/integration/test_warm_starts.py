"""A second process compiles nothing anew, and what was compiled under one plan serves no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxfuse import Plan
from fxfuse._torch.dynamo import counters
from tests.models.sharded import decoder, tokens

PLANS = {
    "one": Plan(drop=["layers.1.attn"], parallel=[["layers.0.mlp", "layers.1.mlp"]]),
    "other": Plan(drop=["layers.2.attn"], parallel=[["layers.1.mlp", "layers.2.mlp"]]),
}
HIT, MISS = "fxgraph_cache_hit", "fxgraph_cache_miss"


def main(name: str) -> None:
    """What each process runs: the model under a plan, from caches that may hold something."""
    plan, model, x = PLANS[name], decoder(3), tokens()
    with torch.no_grad():
        expected = model.planned(x, plan.drop, plan.parallel)
        made = torch.compile(model, backend="ffnfuse", options={"plan": plan})(x)
    error = float((made - expected).abs().max())
    print(json.dumps([error, counters["inductor"][HIT], counters["inductor"][MISS]]))


def run(cache: Path, *arguments: str) -> tuple[int, int]:
    """The hits and misses of a process of its own, whose output is right."""
    command = [sys.executable, "-m", "tests.integration.test_warm_starts", *arguments]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    error, hits, misses = json.loads(done.stdout.splitlines()[-1])
    assert error <= 1e-8
    return hits, misses


@pytest.mark.slow
def test_the_same_plan_is_served_from_the_cache_and_another_is_not(tmp_path: Path) -> None:
    first = run(tmp_path / "cache", "one")
    again = run(tmp_path / "cache", "one")
    other = run(tmp_path / "cache", "other")

    assert first == (0, 1)
    assert again == (1, 0)
    assert other == (0, 1)


if __name__ == "__main__":
    main(sys.argv[1])
