"""Claim: on a CPU in float32, fxfuse decodes at half of inductor's time or less, without a plan and without a copy.

    python benchmarks/decode.py [--batches 1 4] [--contexts 128 2048] [--dtypes float32] [--json FILE]

One more token for SmolLM2-135M after a context that its KV cache holds: under inductor (twice), inductor with frozen
weights, and fxfuse (fxfuse/cpu); in turn, with a second copy of inductor's to tell what the noise is worth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fxfuse._torch.apart import APART, twin
from fxfuse.bench.prefill_decode import decode, filled_cache
from fxfuse.bench.timing import Machine
from fxfuse.data.loading import load
from fxfuse.plan import Plan

BASE, AGAIN = "inductor", "inductor again"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options: dict[str, dict[str, Any]] = {
        BASE: {},
        AGAIN: {},
        "inductor, frozen": {"options": {"freezing": True}},
        "fxfuse": {"backend": "ffnfuse", "options": {"plan": Plan()}},
    }
    rows = []
    for dtype in arguments.dtypes:
        model = load("smollm2", dtype=getattr(torch, dtype)).model.eval()
        for batch in arguments.batches:
            for context in arguments.contexts:
                torch._dynamo.reset()
                programs = {
                    name: torch.compile(twin(model), dynamic=False, **chosen, **APART)
                    for name, chosen in options.items()
                }
                ids = torch.randint(0, 1000, (batch, context), generator=torch.Generator().manual_seed(0))
                caches = {name: filled_cache(model, ids) for name in programs}
                samples = decode(programs, caches, ids, arguments.repeats).samples
                rows.append(
                    {
                        "dtype": dtype,
                        "batch": batch,
                        "context": context,
                        "ms": {name: samples.median(name) * 1e3 for name in programs},
                        "to inductor": {name: samples.ratio(name, BASE) for name in programs},
                        "void": samples.void(BASE, AGAIN),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    machine = Machine.here()
    print(machine)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": str(machine), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
