"""Claim: being true to the weights costs at most 0.3% of a decode step of SmolLM2-135M.

    python benchmarks/call_overhead.py [--json FILE]

Times what fxfuse adds to a call of a compiled graph, over calling that graph directly: the stamps of all members of all
packs, the look at samples of their values, and the passing on of the inputs; and what all checks take where they stand,
in a step that has just filled the caches with other things. Whole parts are compared for a small share of the time on
top (`fxfuse.packing.calls.AUDIT_SHARE`), which `checks_of_step` includes. The plan fuses the FFNs of SmolLM2-135M in
fours, 28 layers of 30, and drops 29 attentions: the step that is compared with is shorter than that of the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from fxfuse import Plan
from fxfuse.bench.timing import Machine, interleave
from fxfuse.data.loading import load
from fxfuse.packing.calls import AUDIT_SHARE, PackedCall, _Bound
from fxfuse.packing.packs import stamp

BUDGET = 0.003


def _in_place(step: Callable[[], object], repeats: int = 200) -> float:
    """Median seconds that the checks take within a step."""
    took: list[float] = []
    original = PackedCall._bound

    def timed(self: PackedCall, members: tuple[torch.Tensor, ...], call: object) -> _Bound:
        start = time.perf_counter()
        made = original(self, members, call)
        took.append(time.perf_counter() - start)
        return made

    with mock.patch.object(PackedCall, "_bound", timed):
        for _ in range(repeats):
            step()
    return statistics.median(took)


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
        members = call._take(args)
        tensors = call.tensors(args)
        (bound,) = call._bounds.values()
        samples = interleave(
            {
                "stamps": lambda: (tuple(map(id, members)), stamp(members)),
                "samples": lambda: [watch.same() for watch in bound.watches],
                "packs checked": lambda: call.tensors(args),
                "graph alone": lambda: call.compiled(*args, *tensors),
                "through fxfuse": lambda: call(*args),
                "decode step": lambda: compiled(ids, use_cache=False),
            },
            repeats=30,
        )
        in_place = _in_place(lambda: compiled(ids, use_cache=False))
    check = samples.median("packs checked")
    step = samples.median("decode step")
    rows = {
        "members": len(members),
        "packs": len(tensors),
        "calls_between_lines_of_a_weight": max(
            watch.round / max(len(each.lines) for each in watch.fingerprints) for watch in bound.watches
        ),
        "stamps_us": samples.median("stamps") * 1e6,
        "samples_us": samples.median("samples") * 1e6,
        "check_us": check * 1e6,
        "check_us_per_member": check * 1e6 / len(members),
        "check_in_place_us": in_place * 1e6,
        "decode_step_ms": step * 1e3,
        "checks_of_step": check / step + AUDIT_SHARE,
        "checks_in_place_of_step": in_place / step + AUDIT_SHARE,
        "through_over_alone": samples.ratio("through fxfuse", "graph alone"),
    }
    machine = Machine.here()
    print(machine)
    for name, value in rows.items():
        print(f"{name}: {value:.6g}")
    print(f"at most {BUDGET:.1%} of a step: {rows['checks_of_step'] <= BUDGET}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": str(machine), **rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
