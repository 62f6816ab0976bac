"""Lives of compiled models, one after the other, for ten minutes.

    python -m tests.soak --minutes 10              # on all cores; prints how far it is
    python -m tests.soak --life 17                 # one of them again

Says of each call that was wrong, and of each error, in which life it came and what had happened before. Exits 1 if
anything was wrong. What a process holds is told and not judged: it grows with each model, without fxfuse by some 30 MB
and with it by some 95, which is not explained yet. Within a life a deed sees to it that calls leave no tensors behind.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.soak.lives import lived


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


def one(seed: int) -> Told:
    try:
        return Told(lived(seed).calls, resident())
    except Exception as error:
        return Told(0, resident(), "".join(traceback.format_exception(error))[-3000:])


def work(first: int, step: int, until: float, told: multiprocessing.Queue[Told]) -> None:
    """Live until the time is over."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    seed = first
    while time.time() < until:
        told.put(one(seed))
        seed += step
    told.put(Told(0, resident(), over=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first life")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--life", type=int, help="this one alone")
    chosen = parser.parse_args()
    if chosen.life is not None:
        torch.set_num_threads(1)
        found = one(chosen.life)
        print(found.wrong or f"life {chosen.life}: {found.calls} calls, all as they should be")
        return bool(found.wrong)
    return soak(chosen.minutes, chosen.seed, chosen.jobs)


def soak(minutes: float, seed: int, jobs: int) -> int:
    """Live in ``jobs`` processes; 1 if anything was wrong."""
    context = multiprocessing.get_context("spawn")
    told: multiprocessing.Queue[Told] = context.Queue()
    start = time.time()
    workers = [
        context.Process(target=work, args=(seed + number, jobs, start + 60 * minutes, told)) for number in range(jobs)
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
