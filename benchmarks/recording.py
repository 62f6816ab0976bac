"""Claim: recording m branches by real drops costs about m / 2 forward passes, not m + 1.

    python benchmarks/recording.py [--tokens 256] [--json FILE]

Times the measuring of one batch by SmolLM2-135M, once traced, against a forward pass of the same batch by the same
uncompiled graph; in turn. Groups of FFNs are not measured (``max_group=0``), which the factor is not about.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fxfuse.bench.timing import Machine, interleave
from fxfuse.data.loading import load
from fxfuse.measure.recorder import Recorder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = load("smollm2", dtype=torch.float32).model.eval()
    batch = {"input_ids": torch.arange(arguments.tokens)[None] + 1000}
    recorder = Recorder(model, None, max_group=0)

    def forward() -> object:
        with torch.no_grad():
            return model(**batch, use_cache=False)

    samples = interleave({"forward": forward, "record": lambda: recorder(0, batch)}, arguments.repeats)
    assert recorder.measured is not None
    branches = len(recorder.measured.places)
    passes = samples.ratio("record", "forward")
    rows = {
        "tokens": arguments.tokens,
        "branches": branches,
        "forward_seconds": samples.median("forward"),
        "record_seconds": samples.median("record"),
        "forward_passes": passes,
        "to_m_plus_1": passes / (branches + 1),
    }
    machine = Machine.here()
    print(machine)
    for name, value in rows.items():
        print(f"{name}: {value:.6g}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": str(machine), **rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
