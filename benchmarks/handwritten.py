"""Claim: what fxfuse makes of SmolLM2-135M is as fast as the same mathematics written by hand, within 3%.

    python benchmarks/handwritten.py [--lengths 1 32 128] [--json FILE]

The plan drops the attentions of layers 5, 6, 7 and fuses the FFNs of layers 4..7. The hand-written model is the model's
own code with those four layers replaced by one whose FFN has the packed weights, gains folded in. It is compiled by
inductor, and also by fxfuse without a plan, because that decodes on CPUs in its own way (fxfuse/cpu). All run in
turn; a second copy of the hand-written model tells what the machine's noise is worth.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import nn

from fxfuse import Plan
from fxfuse.bench.timing import Machine, interleave, relative_distance
from fxfuse.data.loading import load

FIRST, LAST = 4, 7
PLAN = Plan(
    drop=[f"model.layers.{index}.self_attn" for index in range(FIRST + 1, LAST + 1)],
    parallel=[[f"model.layers.{index}.mlp" for index in range(FIRST, LAST + 1)]],
)


class WideFFN(nn.Module):
    """Four SwiGLU FFNs and their norms' gains in two matrices."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        gains = [layer.post_attention_layernorm.weight for layer in layers]
        gate = [layer.mlp.gate_proj.weight * gain for layer, gain in zip(layers, gains, strict=True)]
        up = [layer.mlp.up_proj.weight * gain for layer, gain in zip(layers, gains, strict=True)]
        self.gate_up = nn.Parameter(torch.cat([*gate, *up]))
        self.down = nn.Parameter(torch.cat([layer.mlp.down_proj.weight for layer in layers], 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = nn.functional.linear(x, self.gate_up).chunk(2, -1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.down)


def by_hand(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    layers = made.model.layers
    with torch.no_grad():
        wide = WideFFN([layers[index] for index in range(FIRST, LAST + 1)])
        layers[FIRST].post_attention_layernorm.weight.fill_(1.0)
    layers[FIRST].mlp = wide
    del layers[FIRST + 1 : LAST + 1]
    made.config.num_hidden_layers = len(layers)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = load("smollm2", dtype=torch.float32).model
    hand = by_hand(model)
    rows = []
    for length in arguments.lengths:
        torch._dynamo.reset()
        programs = {
            "original": torch.compile(model, dynamic=False),
            "by hand": torch.compile(hand, dynamic=False),
            "by hand again": torch.compile(by_hand(model), dynamic=False),
            "by hand, by fxfuse": torch.compile(by_hand(model), backend="ffnfuse", dynamic=False),
            "fxfuse": torch.compile(model, backend="ffnfuse", options={"plan": PLAN}, dynamic=False),
        }
        ids = torch.arange(length)[None] + 1000
        calls = {name: (lambda p=program, ids=ids: p(ids, use_cache=False)) for name, program in programs.items()}
        with torch.no_grad():
            distance = relative_distance(calls["fxfuse"]().logits, calls["by hand"]().logits)
            samples = interleave(calls, arguments.repeats, min_seconds=0.1)
        rows.append(
            {
                "tokens": length,
                "ms": {name: samples.median(name) * 1e3 for name in programs},
                "fxfuse / by hand": samples.ratio("fxfuse", "by hand"),
                "fxfuse / by hand, by fxfuse": samples.ratio("fxfuse", "by hand, by fxfuse"),
                "A / A": samples.ratio("by hand again", "by hand"),
                "original / fxfuse": samples.ratio("original", "fxfuse"),
                "void": samples.void("by hand", "by hand again"),
                "output distance": distance,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    machine = Machine.here()
    print(machine)
    print("| tokens | original, ms | by hand, ms | fxfuse, ms | fxfuse / by hand | / by hand, by fxfuse | A / A | |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        ms = row["ms"]
        print(
            f"| {row['tokens']} | {ms['original']:.2f} | {ms['by hand']:.2f} | {ms['fxfuse']:.2f} | "
            f"{row['fxfuse / by hand']:.3f} | {row['fxfuse / by hand, by fxfuse']:.3f} | {row['A / A']:.3f} | "
            f"{'void' if row['void'] else ''} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": str(machine), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
