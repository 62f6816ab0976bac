"""Question: what of fxfuse's lead over inductor is left on a machine that does other work, running or compiling?

    python benchmarks/under_load.py --compiled calm|busy [--busy 4] [--context 2048] [--repeats 21] [--json FILE]

A decode step of SmolLM2-135M under inductor (twice) and under fxfuse without a plan, in turn: on the calm machine, and
with ``--busy`` processes beside it that never sleep. fxfuse chooses by measurement while it compiles; with ``--compiled
busy`` it does so beside those processes. Run each with a TORCHINDUCTOR_CACHE_DIR of its own, because what was chosen is
kept there. FILE holds a row for each of the two, and is written anew by each run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fxfuse._common.files import check_writable, write_atomically
from fxfuse._torch.apart import APART, twin
from fxfuse.bench.prefill_decode import decode, filled_cache
from fxfuse.bench.timing import Machine
from fxfuse.data.loading import load
from fxfuse.plan import Plan

BASE, AGAIN, OURS = "inductor", "inductor again", "fxfuse"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """``count`` processes that never sleep."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", choices=["calm", "busy"], required=True, help="the machine, while it compiles")
    parser.add_argument("--busy", type=int, default=4, help="processes")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.json is not None:
        check_writable(arguments.json)
    machine = str(Machine.here())
    model = load("smollm2", dtype=torch.float32).model.eval()
    options: dict[str, dict[str, Any]] = {
        BASE: {},
        AGAIN: {},
        OURS: {"backend": "ffnfuse", "options": {"plan": Plan()}},
    }
    programs = {name: torch.compile(twin(model), dynamic=False, **chosen, **APART) for name, chosen in options.items()}
    ids = torch.randint(0, 1000, (1, arguments.context), generator=torch.Generator().manual_seed(0))
    caches = {name: filled_cache(model, ids) for name in programs}
    with busy(arguments.busy if arguments.compiled == "busy" else 0):
        decode(programs, caches, ids, 1)
    row: dict[str, Any] = {"machine": machine, "context": arguments.context, "busy": arguments.busy}
    for state, count in (("calm", 0), ("busy", arguments.busy)):
        with busy(count):
            samples = decode(programs, caches, ids, arguments.repeats, progress=True).samples
        ratios = {name: samples.ratio(name, BASE) for name in (AGAIN, OURS)}
        row[state] = {"ms": {name: samples.median(name) * 1e3 for name in programs}, "to inductor": ratios}
        times = ", ".join(f"{name} {samples.median(name) * 1e3:.1f} ms" for name in programs)
        print(f"compiled {arguments.compiled}, run {state}: {times}; of inductor's: {ratios}", flush=True)
    if arguments.json is not None:
        rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        write_atomically(arguments.json, (json.dumps({**rows, arguments.compiled: row}, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
