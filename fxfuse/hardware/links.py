"""Time of an all-reduce between the GPUs of one machine: measured by others, read off a table.

Source: SGLang, pull request 2904, table "custom allreduce": H100 with NVLink, without CUDA graphs. Others' links are
taken to be as quick to start, and to move bytes at the ratio of their data sheets.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from fxfuse.errors import KernelError
from fxfuse.hardware.gpus import Gpu, find
from fxfuse.hardware.times import USUAL, Assumptions

ALL_REDUCE: Mapping[int, Mapping[int, float]] = {
    2: {4_096: 3.9e-6, 32_768: 4.5e-6, 262_144: 7.9e-6, 524_288: 12.5e-6, 1_048_576: 19.9e-6},
    4: {4_096: 3.7e-6, 32_768: 4.8e-6, 262_144: 13.9e-6, 524_288: 20.2e-6, 1_048_576: 31.1e-6},
    8: {4_096: 5.7e-6, 32_768: 7.8e-6, 262_144: 16.7e-6, 524_288: 22.1e-6, 1_048_576: 33.8e-6},
}
"""Seconds by the number of GPUs and by bytes."""


def between(size: float, table: Mapping[int, float], rate: float) -> float:
    """Seconds of ``size`` bytes: linear between the table's sizes, never faster than its smallest.

    Beyond its largest, ``rate`` bytes/s, and never faster than that one.
    """
    rows = sorted(table.items())
    if size >= rows[-1][0]:
        return max(rows[-1][1], size / rate)
    for (low, fast), (high, slow) in pairwise(rows):
        if low <= size < high:
            return fast + (size - low) / (high - low) * (slow - fast)
    return rows[0][1]


def all_reduce(size: float, count: int, gpu: Gpu, assume: Assumptions = USUAL) -> float:
    """Seconds in which ``count`` GPUs add up ``size`` bytes each.

    Raises:
        KernelError: nobody measured so many, or these have no NVLink.
    """
    if count == 1:
        return 0.0
    if count not in ALL_REDUCE:
        raise KernelError(f"there are times of all-reduces for {', '.join(map(str, ALL_REDUCE))} GPUs, not for {count}")
    if not gpu.link:
        raise KernelError(f"there are no times of all-reduces for {gpu.name}, which has no NVLink: simulate it alone")
    table = ALL_REDUCE[count]
    start = min(table.values())
    moving = between(size, table, assume.all_reduce_bandwidth) - start
    return start + moving * find("h100").link / gpu.link
