"""Claim: under tensor parallelism a group of n FFNs costs one all-reduce where the chain cost n; a slow link shows it.

    python -m benchmarks.tensor_parallel [--processes 2 4] [--repeats 15] [--inner NAME] [--json FILE]

A decoder of eight blocks, sharded by torch's DTensor over processes that gloo connects. Columns: the model as it is,
compiled by ``--inner`` alone; under a plan that drops five attentions; under one that drops these and makes six FFNs
parallel, in one group. All-reduces are counted in the compiled graph, and where they run, with their bytes. Each is
made to last as over a link: a sleep of ``latency + 2 (n - 1) / n * bytes / bandwidth``, a ring's time, before gloo's
own. So the times are of that simulation, and not of any network; the machine need not be calm if the link takes most.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from fxfuse import Plan
from fxfuse.bench.timing import Machine

DEPTH, D, HIDDEN, HEAD, TOKENS = 8, 256, 1024, 32, 16
DROPS = [f"layers.{index}.attn" for index in range(2, 7)]
GROUP = [f"layers.{index}.mlp" for index in range(1, 7)]
ORIGINAL, DROPPED, GROUPED = "original", "5 attentions dropped", "and 6 FFNs in a group"
PLANS = {ORIGINAL: None, DROPPED: Plan(drop=DROPS), GROUPED: Plan(drop=DROPS, parallel=[GROUP])}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = [part(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (self.q, self.k, self.v)]
        made: Tensor = self.o(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return made


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, HIDDEN, bias=False), nn.Linear(D, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return made


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

    def planned(self, h: Tensor) -> Tensor:
        """The same under the plan of drops and a group, by its own modules."""
        for index, layer in enumerate(self.layers):
            if f"layers.{index}.attn" not in DROPS:
                h = h + layer.attn(layer.attn_norm(h))
            if (name := f"layers.{index}.mlp") == GROUP[0]:
                members = [self.get_submodule(each.rpartition(".")[0]) for each in GROUP]
                h = h + sum(each.mlp(each.mlp_norm(h)) for each in members)
            elif name not in GROUP:
                h = h + layer.mlp(layer.mlp_norm(h))
        return h


def whole() -> Decoder:
    """The model in one process."""
    torch.manual_seed(0)
    return Decoder().eval()


def sharded() -> Decoder:
    """The model, each process having its part."""
    model = whole()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    into = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
    styles = {name: ColwiseParallel() for name in into} | {name: RowwiseParallel() for name in ("attn.o", "mlp.down")}
    for layer in model.layers:
        parallelize_module(layer, mesh, styles)
    return model


@dataclass(frozen=True)
class Speed:
    """How long a message takes: seconds before its first byte, and bytes a second."""

    latency: float
    bandwidth: float

    def __str__(self) -> str:
        return f"{self.latency * 1e3:g} ms, {self.bandwidth / 1e9:g} GB/s"


SPEEDS = (None, Speed(1e-3, 1e9), Speed(5e-3, 1e8))


class Link:
    """Counts all-reduces and their bytes, and lets each last as over a link."""

    def __init__(self) -> None:
        self.speed: Speed | None = None
        self.count = self.size = 0

    def all_reduce(self, value: Tensor, kind: str, group: str) -> Tensor:
        self.count += 1
        self.size += value.nbytes
        if self.speed is not None:
            share = 2 * (dist.get_world_size() - 1) / dist.get_world_size()
            time.sleep(self.speed.latency + share * value.nbytes / self.speed.bandwidth)
        assert kind == "sum", kind
        dist.all_reduce(value)
        return value

    def all_reduced(self, value: Tensor, kind: str, group: str) -> Tensor:
        return self.all_reduce(value.clone(), kind, group)


def compiled(plan: Plan | None, inner: Any) -> Any:
    """The sharded model under a plan; without one, as ``inner`` alone compiles it."""
    torch.compiler.reset()
    if plan is None:
        return torch.compile(sharded(), backend=inner)
    return torch.compile(sharded(), backend="ffnfuse", options={"plan": plan, "inner": inner})


def in_graph(plan: Plan | None, x: Tensor) -> int:
    """How many all-reduces the graph has that is compiled."""
    found: list[int] = []

    def count(gm: fx.GraphModule, _: Sequence[Tensor]) -> Any:
        found.append(sum("all_reduce" in str(node.target) for node in gm.graph.nodes))
        return gm.forward

    compiled(plan, aot_autograd(fw_compiler=count))(x)
    return sum(found)


@torch.no_grad()
def measured(repeats: int, inner: str) -> list[dict[str, object]]:
    """A row for each column and speed, measured in turn so that all meet the same machine."""
    x = torch.randn(1, TOKENS, D, generator=torch.Generator().manual_seed(1))
    graphs = {name: in_graph(plan, x) for name, plan in PLANS.items()}
    link, library = Link(), torch.library.Library("_c10d_functional", "IMPL")
    library.impl("all_reduce_", link.all_reduce, "CPU", allow_override=True)
    library.impl("all_reduce", link.all_reduced, "CPU", allow_override=True)
    calls, ran, errors = {}, {}, {}
    exact = {ORIGINAL: whole()(x), GROUPED: whole().planned(x)}
    for name, plan in PLANS.items():
        calls[name] = compiled(plan, inner)
        calls[name](x)
        link.count = link.size = 0
        made = calls[name](x)
        ran[name] = link.count, link.size
        errors[name] = float((made - exact[name]).norm() / exact[name].norm()) if name in exact else None
    rows: list[dict[str, object]] = []
    for speed in SPEEDS:
        link.speed, times = speed, {name: list[float]() for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                dist.barrier()
                started = time.perf_counter()
                call(x)
                times[name].append(1e3 * (time.perf_counter() - started))
        for name in calls:
            row = {"processes": dist.get_world_size(), "column": name, "link": str(speed or "gloo alone")}
            row |= {"in_graph": graphs[name], "ran": ran[name][0], "bytes": ran[name][1]}
            ratio = statistics.median(own / base for own, base in zip(times[name], times[ORIGINAL], strict=True))
            rows.append(row | {"ms": statistics.median(times[name]), "to_original": ratio, "error": errors[name]})
    del library
    return rows


def own_process(arguments: argparse.Namespace) -> None:
    """What each process runs."""
    store = f"file://{arguments.folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=arguments.rank, world_size=arguments.processes[0])
    rows = measured(arguments.repeats, arguments.inner)
    if arguments.rank == 0:
        (Path(arguments.folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def together(processes: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.tensor_parallel", "--processes", str(processes)]
        command += ["--repeats", str(arguments.repeats), "--inner", arguments.inner, "--folder", folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ranks = range(processes)
        running = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in ranks]
        if max(process.wait() for process in running):
            sys.exit("a process failed")
        made: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text())
        return made


def show(rows: Sequence[dict[str, Any]]) -> None:
    links = list(dict.fromkeys(row["link"] for row in rows))
    print(
        f"| processes | | all-reduces, in the graph and run | bytes | {' | '.join(f'ms, {each}' for each in links)} |"
    )
    print("|---" * (4 + len(links)) + "|")
    for processes, column in dict.fromkeys((row["processes"], row["column"]) for row in rows):
        own = [row for row in rows if (row["processes"], row["column"]) == (processes, column)]
        times = " | ".join(f"{row['ms']:.1f} ({row['to_original']:.2f})" for row in own)
        counts = f"{own[0]['in_graph']}, {own[0]['ran']} | {own[0]['bytes']:,}"
        print(f"| {processes} | {column} | {counts} | {times} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--inner", default="inductor", help="what compiles the graphs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        own_process(arguments)
        return
    rows = [row for processes in arguments.processes for row in together(processes, arguments)]
    machine = Machine.here()
    print(machine)
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": str(machine), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
