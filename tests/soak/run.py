"""Lives of compiled models, one after the other, for ten minutes.

    python -m tests.soak --minutes 10              # on all cores; prints how far it is
    python -m tests.soak --life 17                 # one of them again
    python -m tests.soak --plain --jobs 1          # with a backend that changes nothing: what Dynamo keeps by itself

Says of each call that was wrong, of each error, and of what a life left behind, in which life it came and what had
happened before. Exits 1 if anything was wrong. No life may leave a model, plan, pack or tensor behind. A process grows
nonetheless, with any backend: Dynamo keeps what it knew of each graph, FakeTensors above all.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import os
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from fxfuse import Plan
from fxfuse.packing.calls import PackedCall
from fxfuse.packing.packs import Pack
from tests.soak import lives


@dataclass(frozen=True)
class Told:
    """What a process says after each life.

    Attributes:
        calls: how many were compared.
        memory: bytes that the process holds.
        wrong: what was wrong; empty if nothing was.
        over: whether it was the last.
    """

    calls: int
    memory: int
    wrong: str = ""
    over: bool = False


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def left() -> list[str]:
    """What a life has left behind: models, plans, packs, and tensors.

    FakeTensors are not meant, nor tensors of one element or none: Dynamo keeps such, with any backend. Fingerprints are
    taken through one tensor that stands for all memory.
    """
    gc.collect()
    held = [each for each in gc.get_objects() if issubclass(type(each), HELD) and not isinstance(each, FakeTensor)]
    return [type(each).__name__ for each in held if not isinstance(each, Tensor) or 1 < each.numel() < WHOLE_MEMORY]


HELD = (Tensor, PreTrainedModel, Plan, Pack, PackedCall)
WHOLE_MEMORY = 2**32


def one(seed: int) -> Told:
    try:
        calls = lives.lived(seed).calls
    except Exception as error:
        return Told(0, resident(), "".join(traceback.format_exception(error))[-3000:])
    behind = left()
    return Told(calls, resident(), f"life {seed} left {', '.join(behind)}" if behind else "")


def work(first: int, step: int, until: float, plain: bool, told: multiprocessing.Queue[Told]) -> None:
    """Live until the time is over."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if plain:
        change_nothing()
    seed = first
    while time.time() < until:
        told.put(one(seed))
        seed += step
    told.put(Told(0, resident(), over=True))


def change_nothing() -> None:
    """Let lives compile with the inner compiler alone, and compare nothing."""

    def plain(gm: torch.fx.GraphModule, inputs: list[Any], *, options: dict[str, Any], **_: object) -> Any:
        return lookup_backend(options["inner"])(gm, inputs)

    torch._dynamo.config.recompile_limit = 64  # as fxfuse's: otherwise fewer graphs would be compiled
    mock.patch.object(lives, "ffnfuse", plain).start()
    mock.patch.object(lives.Life, "check", _count).start()


def _count(life: lives.Life, *_: Tensor) -> None:
    life.calls += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first life")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--life", type=int, help="this one alone")
    parser.add_argument("--plain", action="store_true", help="without fxfuse, and without comparing")
    chosen = parser.parse_args()
    if chosen.life is not None:
        torch.set_num_threads(1)
        found = one(chosen.life)
        print(found.wrong or f"life {chosen.life}: {found.calls} calls, all as they should be")
        return bool(found.wrong)
    return soak(chosen.minutes, chosen.seed, chosen.jobs, chosen.plain)


def soak(minutes: float, seed: int, jobs: int, plain: bool) -> int:
    """Live in ``jobs`` processes; 1 if anything was wrong."""
    context = multiprocessing.get_context("spawn")
    told: multiprocessing.Queue[Told] = context.Queue()
    start = time.time()
    workers = [
        context.Process(target=work, args=(seed + number, jobs, start + 60 * minutes, plain, told))
        for number in range(jobs)
    ]
    for worker in workers:
        worker.start()
    lives, calls, wrong, running = 0, 0, 0, jobs
    while running:
        each = told.get()
        if each.over:
            running -= 1
            continue
        lives, calls = lives + 1, calls + each.calls
        if each.wrong:
            wrong += 1
            print(f"WRONG {wrong}\n{each.wrong}\n", flush=True)
        spent = time.time() - start
        left = max(0.0, 60 * minutes - spent)
        print(
            f"{lives:4} lives, {calls:6} calls, {wrong} wrong, {each.memory / 1e6:,.0f} MB, {left:.0f} s left",
            flush=True,
        )
    print(f"{lives} lives, {calls} calls, {wrong} wrong")
    return int(bool(wrong))
