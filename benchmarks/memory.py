"""Claim: under ``weights="share"`` a planned model needs no more memory than 1.05 times what inductor alone needs.

    python benchmarks/memory.py [--layers 5] [--width 1024] [--hidden 4096] [--json FILE]

Each row is a process of its own, which loads a Llama of random weights (float32, a third of a GB) from a folder,
compiles it and calls it once. The file is in bfloat16: weights that lie in a file as they are used stay mapped, and
the kernel counts such pages as the process's for as long as any weight of the file is in use, though it can drop
them. Peak: the most memory that the process had, from its start on. Held: what it has after the call. The plan drops
the attentions between the first layer and the last, and fuses the FFNs there in threes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxfuse import Plan
from fxfuse.bench.timing import Machine
from fxfuse.data.loading import load

BUDGET = 1.05
PLAIN = "inductor alone"
OPTIONS: Mapping[str, Mapping[str, object] | None] = {
    PLAIN: None,
    "no plan": {"plan": Plan()},
    "planned, copy": {"weights": "copy"},
    "planned, share": {"weights": "share"},
}


def plan_of(layers: int) -> Plan:
    inner = list(range(1, layers - 1))
    return Plan(
        drop=[f"model.layers.{index}.self_attn" for index in inner],
        parallel=[[f"model.layers.{i}.mlp" for i in inner[s : s + 3]] for s in range(0, len(inner) // 3 * 3, 3)],
    )


def memory(of: str) -> int:
    """Bytes of this process: ``VmHWM``, the most it had, or ``VmRSS``, what it has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{of}:")).split()[1]) * 1024


@torch.no_grad()
def measured(folder: Path, name: str) -> dict[str, int]:
    """What one process needs."""
    model: Any = load(str(folder), torch.float32).model
    loaded = memory("VmHWM")
    options = OPTIONS[name]
    if options is None:
        compiled: Any = torch.compile(model)
    else:
        plan = plan_of(model.config.num_hidden_layers)
        compiled = torch.compile(model, backend="ffnfuse", options={"plan": plan, **options})
    compiled(torch.arange(16)[None], use_cache=False)
    gc.collect()
    return {"loaded": loaded, "peak": memory("VmHWM"), "held": memory("VmRSS")}


def write(folder: Path, arguments: argparse.Namespace) -> int:
    """A model of random weights, in its folder; the bytes of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": arguments.width, "intermediate_size": arguments.hidden, "vocab_size": 1000}
    config = LlamaConfig(num_hidden_layers=arguments.layers, num_attention_heads=arguments.width // 64, **sizes)
    model: nn.Module = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder)  # type: ignore[operator]
    return sum(2 * each.nbytes for each in model.parameters())


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    print("| | peak, MB | to inductor alone | held, MB | to inductor alone |\n|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row[key] / 1e6:.0f} | {row[key] / rows[0][key]:.3f}" for key in ("peak", "held")]
        print(f"| {row['name']} | {' | '.join(cells)} |")
    share = rows[-1]["peak"] / rows[0]["peak"]
    print(f"at most {BUDGET} times: {share <= BUDGET}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measured(Path(arguments.one[0]), arguments.one[1])))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        weights = write(Path(folder) / "model", arguments)
        for name in OPTIONS:
            command = [sys.executable, __file__, "--one", f"{folder}/model", name]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/{len(rows)}"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"name": name, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    machine = Machine.here()
    print(f"{machine}; {weights / 1e6:.0f} MB of weights")
    show(rows)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": str(machine), "weights": weights, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
