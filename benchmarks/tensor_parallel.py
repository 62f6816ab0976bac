"""Claim: under tensor parallelism a group of n FFNs costs one all-reduce, and the model has none but one for each sum.

    python -m benchmarks.tensor_parallel [--processes 2] [--delays 0 0.5 2] [--repeats 15] [--inner NAME] [--json FILE]

A decoder of eight blocks, sharded by torch's DTensor over processes that gloo connects. Three columns: the model as it
is; under a plan that drops five attentions and makes six FFNs parallel, nothing fused (`max_rewrites=0`); and the same
fused, which computes the same. All-reduces and their bytes are counted where they run. Each all-reduce is delayed by so
many milliseconds, as over a slow link: the times are of that simulation, and not of any network.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from fxfuse import Plan
from fxfuse.bench.timing import Machine

DEPTH, D, HIDDEN, HEAD, TOKENS = 8, 256, 1024, 32, 16
PLAN = Plan(
    drop=[f"layers.{index}.attn" for index in range(2, 7)],
    parallel=[[f"layers.{index}.mlp" for index in range(1, 7)]],
)
COLUMNS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "planned": {"plan": PLAN, "max_rewrites": 0},
    "planned, fused": {"plan": PLAN},
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = [part(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (self.q, self.k, self.v)]
        return self.o(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, HIDDEN, bias=False), nn.Linear(D, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attn(self.attn_norm(h))
        return h + self.mlp(self.mlp_norm(h))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return h


def sharded() -> Decoder:
    """The model, each process having its part."""
    torch.manual_seed(0)
    model = Decoder().eval()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    into = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
    styles = {name: ColwiseParallel() for name in into} | {name: RowwiseParallel() for name in ("attn.o", "mlp.down")}
    for layer in model.layers:
        parallelize_module(layer, mesh, styles)
    return model


@dataclass
class Link:
    """Counts all-reduces and their bytes, and delays each by so many seconds."""

    delay: float = 0.0
    count: int = 0
    size: int = 0

    def all_reduce(self, value: Tensor, kind: str, group: str) -> Tensor:
        self.count += 1
        self.size += value.nbytes
        time.sleep(self.delay)
        dist.all_reduce(value)
        return value

    def all_reduced(self, value: Tensor, kind: str, group: str) -> Tensor:
        return self.all_reduce(value.clone(), kind, group)


@torch.no_grad()
def measured(delays: list[float], repeats: int, inner: str) -> list[dict[str, object]]:
    """A row for each column and delay, measured in turn so that all meet the same machine."""
    link, library = Link(), torch.library.Library("_c10d_functional", "IMPL")
    library.impl("all_reduce_", link.all_reduce, "CPU", allow_override=True)
    library.impl("all_reduce", link.all_reduced, "CPU", allow_override=True)
    x = torch.randn(1, TOKENS, D, generator=torch.Generator().manual_seed(1))
    calls, outputs, counts = {}, {}, {}
    for name, options in COLUMNS.items():
        calls[name] = torch.compile(sharded(), backend="ffnfuse", options={"plan": Plan(), "inner": inner} | options)
        calls[name](x)
        link.count = link.size = 0
        outputs[name] = calls[name](x)
        counts[name] = link.count, link.size
    error = float((outputs["planned"] - outputs["planned, fused"]).norm() / outputs["planned"].norm())
    rows: list[dict[str, object]] = []
    for delay in delays:
        link.delay, times = delay / 1e3, {name: list[float]() for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                dist.barrier()
                started = time.perf_counter()
                call(x)
                times[name].append(1e3 * (time.perf_counter() - started))
        for name in calls:
            found = {"column": name, "delay_ms": delay, "all_reduces": counts[name][0], "bytes": counts[name][1]}
            rows.append(found | {"ms": statistics.median(times[name]), "fused_from_planned": error})
    del library
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 0.5, 2], metavar="MS")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--inner", default="inductor", help="what compiles the graphs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.tensor_parallel", *sys.argv[1:], "--folder", folder]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            running = [
                subprocess.Popen([*command, "--rank", str(rank)], env=environment)
                for rank in range(arguments.processes)
            ]
            sys.exit(max(process.wait() for process in running))
    store = f"file://{arguments.folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=arguments.rank, world_size=arguments.processes)
    rows = measured(arguments.delays, arguments.repeats, arguments.inner)
    if arguments.rank == 0:
        for row in rows:
            print(json.dumps(row))
        if arguments.json:
            machine = Machine.here()
            arguments.json.write_text(json.dumps({"machine": str(machine), "rows": rows}, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
