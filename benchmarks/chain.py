"""Claim: a chain of four FFNs on a CPU is never slower under fxfuse than under eager or inductor, frozen or autotuned.

    python benchmarks/chain.py [--shapes 576x1536 2048x5632] [--tokens 1 32 256] [--dtypes float32] [--json FILE]

Four SwiGLU FFNs with their RMS norms and residual adds and nothing between them. From left to right: eager; inductor
(twice); inductor with frozen weights; frozen, with max-autotune; fxfuse with the FFNs one after the other; fxfuse with
all four as one wide FFN, which is another function; and both with prepacked weights. So the shares can be told apart of
how fxfuse computes linear maps on CPUs, of width, and of prepacking.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse import Plan
from fxfuse._torch.apart import APART, twin
from fxfuse.bench.timing import Machine, interleave

COUNT = 4
BASE, AGAIN = "inductor", "inductor again"
WIDE = Plan(parallel=[[f"layers.{index}.mlp" for index in range(COUNT)]])
COLUMNS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    BASE: {},
    AGAIN: {},
    "frozen": {"options": {"freezing": True}},
    "frozen, autotuned": {"options": {"freezing": True, "max_autotune": True}},
    "fxfuse": {"backend": "ffnfuse", "options": {"plan": Plan()}},
    "fxfuse, wide": {"backend": "ffnfuse", "options": {"plan": WIDE}},
    "prepacked": {"backend": "ffnfuse", "options": {"plan": Plan(), "prepack": True}},
    "prepacked, wide": {"backend": "ffnfuse", "options": {"plan": WIDE, "prepack": True}},
}


class SwiGLU(nn.Module):
    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(d, eps=1e-5), SwiGLU(d, f)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mlp(self.norm(h))


class Chain(nn.Module):
    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(d, f) for _ in range(COUNT))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return h


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "2048x5632"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for dtype in arguments.dtypes:
        for shape in arguments.shapes:
            d, f = map(int, shape.split("x"))
            torch.manual_seed(0)
            model = Chain(d, f).to(getattr(torch, dtype)).eval()
            for tokens in arguments.tokens:
                rows.append(measured(model, torch.randn(1, tokens, d, dtype=getattr(torch, dtype)), arguments.repeats))
                rows[-1] |= {"dtype": dtype, "d": d, "f": f}
                print(json.dumps(rows[-1]), flush=True)
    machine = Machine.here()
    print(machine)
    print(f"| d, f | dtype | M | {' | '.join(f'{name}, ms' for name in COLUMNS)} | |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    for row in rows:
        cells = [f"{row['ms'][name]:.3f}" for name in COLUMNS]
        best = row["to inductor"]["prepacked, wide"]
        notes = ("void; " if row["void"] else "") + f"{1 / best:.2f} times as fast as inductor"
        print(f"| {row['d']}, {row['f']} | {row['dtype']} | {row['tokens']} | {' | '.join(cells)} | {notes} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": str(machine), "rows": rows}, indent=2) + "\n")


def measured(model: nn.Module, x: Tensor, repeats: int) -> dict[str, Any]:
    torch._dynamo.reset()
    programs = {
        name: model if chosen is None else torch.compile(twin(model), dynamic=False, **chosen, **APART)
        for name, chosen in COLUMNS.items()
    }
    with torch.no_grad():
        samples = interleave({name: lambda p=program: p(x) for name, program in programs.items()}, repeats, 0.03)
    return {
        "tokens": x.shape[1],
        "ms": {name: samples.median(name) * 1e3 for name in programs},
        "to inductor": {name: samples.ratio(name, BASE) for name in programs},
        "void": samples.void(BASE, AGAIN),
    }


if __name__ == "__main__":
    main()
