"""Processes that are forked, so that all that was imported is there at once; each with the time that it has.

CUDA cannot be forked: what forks must not have started it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.context import ForkProcess
from typing import TypeVar

FORK = multiprocessing.get_context("fork")
T = TypeVar("T")


def asked(question: Callable[[], T], seconds: float) -> T:
    """What ``question`` answers in a process of its own.

    Raises:
        RuntimeError: it did not answer in time; whatever it printed is on stderr.
    """
    mine, its = FORK.Pipe()
    process = started(lambda pipe: pipe.send(question()), its)
    its.close()
    try:
        if mine.poll(seconds):
            return mine.recv()
    except EOFError:
        pass
    finally:
        ended(process, 1)
    raise RuntimeError(f"a process gave no answer within {seconds:.0f} s, or died of what stands above")


def started(target: Callable[..., None], *arguments: object) -> ForkProcess:
    """A process that leads a group of its own, so that all it starts can be ended with it."""

    def lead() -> None:
        os.setsid()
        target(*arguments)

    process = FORK.Process(target=lead)
    process.start()
    return process


def ended(process: ForkProcess, seconds: float) -> bool:
    """Wait for a process; end it and all that it started if it takes longer. Whether it ended by itself."""
    process.join(max(0.0, seconds))
    own = process.exitcode is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()
    return own


def side_by_side(jobs: Sequence[Callable[[], object]], seconds: float) -> None:
    """Do ``jobs``, whose results nobody waits for, on all cores but one; what is not done in time is left."""
    count = max(1, min(len(jobs), (os.cpu_count() or 2) - 1))

    def some(first: int) -> None:
        for job in jobs[first::count]:
            job()

    processes = [FORK.Process(target=some, args=(first,)) for first in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
