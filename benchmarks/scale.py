"""Claim: finding the stream and applying a plan takes under 1.2 s at the size of Llama-405B, and time linear in depth.

    python benchmarks/scale.py [--json FILE]

Traces Llama geometries of 32 to 126 layers on the meta device (tracing is Dynamo's time and is not counted), and times
`find_streams` and `apply_plan` with the middle third's attention dropped and its FFNs fused in fours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from fxfuse import Plan
from fxfuse.backend.frontend import Captured, capture
from fxfuse.bench.timing import Machine
from fxfuse.graph.surgery import copy_graph
from fxfuse.passes import apply_plan
from fxfuse.stream.finder import find_streams

DEPTHS = (32, 63, 126)
LIMIT = 1.2


def llama(layers: int) -> nn.Module:
    """The geometry of Llama-3.1-405B, cut to ``layers`` layers, on the meta device."""
    config = LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=layers,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def plan_for(layers: int) -> Plan:
    """No attention in the middle third; its FFNs in groups of four."""
    start, stop = layers // 3, 2 * layers // 3
    return Plan(
        drop=[f"model.layers.{index}.self_attn" for index in range(start, stop)],
        parallel=[
            [f"model.layers.{index}.mlp" for index in range(first, first + 4)] for first in range(start, stop - 3, 4)
        ],
    )


def copy_of(captured: Captured) -> tuple[torch.fx.GraphModule, dict[torch.fx.Node, str]]:
    """A graph to rewrite, and its names."""
    gm = torch.fx.GraphModule(captured.gm, copy_graph(captured.gm.graph))
    old, new = (g.graph.find_nodes(op="placeholder") for g in (captured.gm, gm))
    return gm, {b: captured.names[a] for a, b in zip(old, new, strict=True) if a in captured.names}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(layers: int, repeats: int = 5) -> dict[str, float]:
    """Medians of ``repeats`` runs for one depth, in seconds."""
    (captured,) = capture(llama(layers), torch.zeros(1, 8, dtype=torch.long, device="meta"), use_cache=False)
    finding, applying = [], []
    for _ in range(repeats):
        gm, names = copy_of(captured)
        finding.append(seconds(lambda gm=gm, names=names: find_streams(gm, names)))
        applying.append(seconds(lambda gm=gm, names=names: apply_plan(gm, plan_for(layers), names=names)))
    return {
        "layers": layers,
        "nodes": len(captured.gm.graph.nodes),
        "find_streams": statistics.median(finding),
        "apply_plan": statistics.median(applying),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = Machine.here()
    rows = [measure(layers) for layers in DEPTHS]
    print(machine)
    print("| layers | nodes | find_streams, s | apply_plan, s | apply_plan, us per node |\n|---|---|---|---|---|")
    for row in rows:
        per_node = 1e6 * row["apply_plan"] / row["nodes"]
        times = f"{row['find_streams']:.3f} | {row['apply_plan']:.3f} | {per_node:.0f}"
        print(f"| {row['layers']} | {row['nodes']:,} | {times} |")
    print(f"126 layers under {LIMIT} s: {rows[-1]['apply_plan'] < LIMIT}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": str(machine), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
