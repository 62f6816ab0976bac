"""Claim: being true to the weights costs a call under 0.12 us per packed weight, and under 0.1% of a decode step.

    python benchmarks/call_overhead.py [--json FILE]

Times what fxfuse adds to a call of a compiled graph, over calling that graph directly: the check of every member of
every pack, and the passing on of the inputs. The plan fuses the FFNs of SmolLM2-135M in fours, all 30 layers' worth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fxfuse import Plan
from fxfuse.bench import Machine, interleave
from fxfuse.loading import load
from fxfuse.weights import PackedCall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = load("smollm2", dtype=torch.float32).model
    plan = Plan(
        drop=[f"model.layers.{index}.self_attn" for index in range(1, 30)],
        parallel=[[f"model.layers.{index}.mlp" for index in range(s, min(s + 4, 30))] for s in range(0, 28, 4)],
    )
    seen: list[tuple[PackedCall, tuple[torch.Tensor, ...]]] = []
    original = PackedCall.__call__

    def spy(self: PackedCall, *args: torch.Tensor) -> object:
        seen.append((self, args))
        return original(self, *args)

    PackedCall.__call__ = spy  # type: ignore[method-assign]  # to get at the call that Dynamo makes
    ids = torch.zeros(1, 1, dtype=torch.long)
    compiled = torch.compile(model, backend="ffnfuse", options={"plan": plan}, dynamic=False)
    with torch.no_grad():
        compiled(ids, use_cache=False)
        compiled(ids, use_cache=False)
        call, args = seen[-1]
        PackedCall.__call__ = original  # type: ignore[method-assign]
        members = len(call._inputs)
        tensors = call.tensors(args)
        samples = interleave(
            {
                "packs checked": lambda: call.tensors(args),
                "graph alone": lambda: call.compiled(*args, *tensors),
                "through fxfuse": lambda: call(*args),
                "decode step": lambda: compiled(ids, use_cache=False),
            },
            repeats=30,
        )
    check = samples.median("packs checked")
    step = samples.median("decode step")
    rows = {
        "members": members,
        "packs": len(tensors),
        "check_us": check * 1e6,
        "check_us_per_member": check * 1e6 / members,
        "decode_step_ms": step * 1e3,
        "share_of_step": check / step,
        "through_over_alone": samples.ratio("through fxfuse", "graph alone"),
    }
    machine = Machine.here()
    print(machine)
    for name, value in rows.items():
        print(f"{name}: {value:.6g}")
    print(
        f"under 0.12 us per member: {rows['check_us_per_member'] < 0.12}; under 0.1% of a step: {check / step < 0.001}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": str(machine), **rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
