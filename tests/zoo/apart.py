"""A net checked in a process of its own, so that one which dies or never ends harms no other."""

from __future__ import annotations

import multiprocessing
import os
import resource
from multiprocessing.connection import Connection

import torch

from tests.zoo.check import Result, check, from_dict
from tests.zoo.nets import Entry, entries

CPU_SECONDS = 240
"""The limit is on CPU time, because a busy machine does not make a net slow."""

# A server that has imported torch and forks a process for each net.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.zoo.apart"])


def check_apart(entry: Entry) -> Result:
    """:func:`tests.zoo.check.check` in a process of its own."""
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_child, args=(entry.name, sender))
    process.start()
    sender.close()
    try:
        result = from_dict(receiver.recv())
    except EOFError:
        result = None
    process.join()
    if result is not None:
        return result
    died = f"its process died with exit code {process.exitcode}; the limit is {CPU_SECONDS} s of CPU time"
    return Result(entry.name, entry.origin, died, built=True)


def _child(name: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    sender.send(check(entries()[name]).to_dict())
