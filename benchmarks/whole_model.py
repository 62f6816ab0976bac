"""Claim: SmolLM2-135M under a plan is faster by fxfuse with prepacked weights than by inductor, frozen or not.

    python benchmarks/whole_model.py [--lengths 1 32 256] [--dtypes float32 bfloat16] [--json FILE]

The same plan on both sides: fxfuse gets the model and the plan of `handwritten`, inductor the model in which the same
mathematics is written by hand. Each time is also compared with what the machine could do at best: all weights read
once at its bandwidth, or all products computed at its speed, whichever takes longer; both measured here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from handwritten import PLAN, by_hand
from torch import nn

from fxfuse._torch.apart import APART, twin
from fxfuse.bench.timing import Machine, interleave, relative_distance
from fxfuse.data.loading import load

BASE, AGAIN = "inductor", "inductor again"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        model = load("smollm2", dtype=dtype).model
        limits = bandwidth(dtype), speed(dtype)
        for length in arguments.lengths:
            rows.append({"dtype": name, **measured(model, length, limits, arguments.repeats)})
            print(json.dumps(rows[-1]), flush=True)
    machine = Machine.here()
    print(machine)
    columns = list(rows[0]["ms"])
    print(f"| dtype | tokens | limit, ms | {' | '.join(f'{column}, ms' for column in columns)} | to inductor | |")
    print("|---" * (len(columns) + 5) + "|")
    for row in rows:
        cells = " | ".join(f"{row['ms'][column]:.2f}" for column in columns)
        best = row["to inductor"]["fxfuse, prepacked"]
        print(
            f"| {row['dtype']} | {row['tokens']} | {row['limit, ms']:.2f} | {cells} | {best:.3f} | "
            f"{'void' if row['void'] else ''} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": str(machine), "rows": rows}, indent=2) + "\n")


def measured(model: nn.Module, length: int, limits: tuple[float, float], repeats: int) -> dict[str, Any]:
    torch._dynamo.reset()
    hand = by_hand(model)

    def inductor(**options: object) -> Callable[..., Any]:
        return torch.compile(twin(hand), dynamic=False, **APART, **options)

    def fxfuse(**options: object) -> Callable[..., Any]:
        return torch.compile(twin(model), backend="ffnfuse", dynamic=False, options={"plan": PLAN, **options}, **APART)

    programs = {
        BASE: inductor(),
        AGAIN: inductor(),
        "frozen": inductor(options={"freezing": True}),
        "fxfuse": fxfuse(),
        "fxfuse, prepacked": fxfuse(prepack=True),
    }
    ids = torch.arange(length)[None] + 1000
    calls = {name: (lambda p=program: p(ids, use_cache=False)) for name, program in programs.items()}
    with torch.no_grad():
        reference = calls[BASE]().logits
        apart = {name: relative_distance(call().logits, reference) for name, call in calls.items()}
        samples = interleave(calls, repeats, min_seconds=0.1)
    weights = sum(each.weight.numel() for each in hand.modules() if isinstance(each, nn.Linear))
    weights += sum(each.numel() for name, each in hand.named_parameters() if name.endswith(("gate_up", "mlp.down")))
    item = next(model.parameters()).element_size()
    limit = max(weights * item / limits[0], 2 * weights * length / limits[1])
    return {
        "tokens": length,
        "ms": {name: samples.median(name) * 1e3 for name in programs},
        "to inductor": {name: samples.ratio(name, BASE) for name in programs},
        "limit, ms": limit * 1e3,
        "bandwidth, GB/s": limits[0] / 1e9,
        "speed, GFLOP/s": limits[1] / 1e9,
        "output distance": apart,
        "void": samples.void(BASE, AGAIN),
    }


def bandwidth(dtype: torch.dtype) -> float:
    """Bytes per second at which this machine reads memory: what a sum over a large tensor reaches."""
    tensor = torch.ones((1 << 30) // dtype.itemsize, dtype=dtype)
    return tensor.nbytes / best(lambda: tensor.view(-1, 4096).sum(1))


def speed(dtype: torch.dtype) -> float:
    """Operations per second that this machine computes: what a large product of matrices reaches."""
    matrix = torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / best(lambda: matrix @ matrix)


def best(function: Callable[[], object]) -> float:
    def timed() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return min(timed() for _ in range(7))


if __name__ == "__main__":
    main()
