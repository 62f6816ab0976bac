"""Seconds of calls on a GPU: replays of a CUDA graph that makes them, timed by events.

In a graph, launches cost the host nothing, so that short kernels are measured and not Python. The calls of a graph take
turns on several copies of their weights, so that none finds them in the L2 cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
Timer = Callable[[], float]
"""Seconds of one call, measured anew each time it is asked."""

CALLS = 4
"""Calls in one graph, at least: what it costs to start a graph is not theirs."""

COLD = 192 << 20
"""Bytes after which a cache holds nothing of what was read before: three times the L2 of an H200."""

COPIES = 8
"""Copies of weights, at most."""


def copies(weight_bytes: int, device: torch.device) -> int:
    """On how many copies of weights the calls of a graph must take turns; on a CPU, where nothing is measured, one."""
    return 1 if device.type == "cpu" else max(1, min(COPIES, -(-COLD // weight_bytes)))


def repeated(calls: Sequence[Call]) -> list[Call]:
    """All of them in turn, as often as it takes to fill a graph."""
    return [*calls] * -(-CALLS // len(calls))


def seconds(calls: Sequence[Call], device: torch.device, captured: bool = True, replays: int = 20) -> float:
    """Seconds of one call: the median of so many replays of all ``calls``. See `timer`."""
    once = timer(calls, device, captured)
    return statistics.median(once() for _ in range(replays))


def timer(calls: Sequence[Call], device: torch.device, captured: bool = True) -> Timer:
    """Compile and capture ``calls``, and return what times one replay of all, divided by their number.

    Args:
        calls: the same work on different memory.
        device: where they compute. On a CPU they are made one by one, by the clock on the wall.
        captured: as a CUDA graph; otherwise, what a call costs the host shows where the GPU waits for it.
    """

    def once() -> None:
        for call in calls:
            call()

    once()  # compiles
    if device.type == "cpu":
        return lambda: _on_the_wall(once) / len(calls)
    once()
    torch.cuda.synchronize(device)
    run: Callable[[], None] = once
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        run = graph.replay
    run()
    return lambda: _by_events(run) / len(calls)


def _by_events(run: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # by torch
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _on_the_wall(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
