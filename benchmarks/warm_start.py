"""Claim: a second process takes less than a quarter of the time to compile a planned model that the first one took.

    python benchmarks/warm_start.py [--model smollm2] [--plan FILE] [--tokens 32] [--json FILE]

Three processes, one after the other, each of which loads the model and calls it under the plan: with empty caches of
inductor; with those that the first has filled; and with empty ones again and what ``torch.compiler`` saved of the
first's in one file (``save_cache_artifacts``), which holds graphs and no kernels in C++: those are compiled again. The
time is that of the first call, Dynamo's tracing and the packing of weights included, less that of a later call; that of
reading the file is added to the third's. Without ``--plan``: attentions 5 to 7 dropped, FFNs 4 to 7 as one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fxfuse import Plan
from fxfuse._torch.dynamo import counters
from fxfuse.bench.timing import Machine
from fxfuse.data.loading import load

BUDGET = 0.25
"""Of the first process' time, the most that another may take."""

PLAN = Plan(
    drop=[f"model.layers.{index}.self_attn" for index in (5, 6, 7)],
    parallel=[[f"model.layers.{index}.mlp" for index in (4, 5, 6, 7)]],
)


def measured(arguments: argparse.Namespace) -> dict[str, object]:
    """What one process takes."""
    started = time.perf_counter()
    if arguments.load is not None:
        torch.compiler.load_cache_artifacts(arguments.load.read_bytes())
    loaded = time.perf_counter() - started
    model = load(arguments.model).model
    plan = PLAN if arguments.plan is None else Plan.load(arguments.plan)
    compiled = torch.compile(model.eval(), backend="ffnfuse", options={"plan": plan})
    x = torch.arange(arguments.tokens)[None]
    times = []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            compiled(x, use_cache=False)
            times.append(time.perf_counter() - started)
    if arguments.save is not None and (made := torch.compiler.save_cache_artifacts()) is not None:
        arguments.save.write_bytes(made[0])
    found = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}
    return {"seconds": times[0] - min(times[1:]) + loaded, "loading_artifacts": loaded, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measured(arguments)))
        return
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        saved = f"{folder}/artifacts"
        for name, cache, more in (
            ("cold", "one", ["--save", saved]),
            ("warm", "one", []),
            ("from artifacts", "two", ["--load", saved]),
        ):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", *more]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/{cache}"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            rows[name] = json.loads(done.stdout.splitlines()[-1])
            rows[name]["to_cold"] = rows[name]["seconds"] / rows["cold"]["seconds"]
            print(
                f"{name}: {rows[name]['seconds']:.1f} s, {rows[name]['to_cold']:.0%} of cold; {rows[name]}", flush=True
            )
    machine = Machine.here()
    print(machine)
    print(f"at most {BUDGET:.0%} of cold: {all(rows[name]['to_cold'] <= BUDGET for name in rows if name != 'cold')}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": str(machine), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
