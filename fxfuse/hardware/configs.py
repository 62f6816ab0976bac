"""Which tiles: one table, from which `pick` picks.

Its tiles were chosen by what they compile to (no spills, enough shared memory, wgmma; see `compile`) and by arithmetic.
No GPU has timed them: `tune` does, where there is one, and keeps what it finds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from fxfuse.errors import KernelError

Kernel = Literal["gate_up", "down"]

GROUP = 8
"""Tiles of rows that go through the columns together."""

MANY_TOKENS = 64
"""Up to so many, a wide FFN is bound by reading its weights; with more of them, sooner or later by its products."""

MAX_SPLIT = 16
"""By how many the depth is split at most."""

CROWD = 8
"""Programs for each multiprocessor that a split depth makes at most: more only grow its workspace."""

COUNTERS = 1024
"""Tiles whose depth can be split at most: one counter each."""

LOOP_ROWS = 32
"""Tiles of up to this many tokens take the norm's statistics along; for larger ones they are a kernel of their own."""


@dataclass(frozen=True)
class Gemm:
    """What is multiplied: ``[M, K]`` by ``[N, K]``; N of gate and up counts hidden units, not projections."""

    kernel: Kernel | Literal["linear"]
    """Which of fxfuse's kernels multiplies; "linear" for a linear map that others compute."""
    M: int
    N: int
    K: int
    dtype: torch.dtype
    aligned: bool = True
    """Whether all sizes and strides are multiples of 16 elements and all addresses of 16 bytes."""
    threads: int = 0
    """On a CPU, how many compute it."""


@dataclass(frozen=True)
class Config:
    """How it is cut: tiles of ``[rows, columns]``, in steps of ``depth``."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool = False
    """Through tensor descriptors (sm_90)."""
    split: int = 1
    """Programs that share the depth of a tile."""

    def tiles(self, gemm: Gemm) -> int:
        """Tiles of the result."""
        return -(-gemm.M // self.rows) * -(-gemm.N // self.columns)


@dataclass(frozen=True)
class Row:
    """A line of the table: ``config`` serves these kernels."""

    kernel: Kernel
    arch: tuple[int, ...]
    bits: int
    aligned: bool
    config: Config


_ALL, _AMPERE, _HOPPER = (80, 86, 90), (80, 86), (90,)

# For each kernel, architecture, dtype and alignment: from the largest tile to the smallest.
TABLE: tuple[Row, ...] = (
    # float16 and bfloat16, aligned: cp.async feeds tensor cores; on sm_90, TMA feeds wgmma from 64 tokens on
    Row("gate_up", _HOPPER, 16, True, Config(128, 128, 64, warps=8, stages=3, tma=True)),
    Row("gate_up", _HOPPER, 16, True, Config(128, 64, 64, warps=4, stages=4, tma=True)),
    Row("gate_up", _HOPPER, 16, True, Config(64, 128, 64, warps=4, stages=4, tma=True)),
    Row("gate_up", _HOPPER, 16, True, Config(64, 64, 64, warps=4, stages=4, tma=True)),
    Row("gate_up", _AMPERE, 16, True, Config(128, 64, 64, warps=8, stages=3)),
    Row("gate_up", _AMPERE, 16, True, Config(64, 64, 64, warps=4, stages=3)),
    Row("gate_up", _ALL, 16, True, Config(64, 32, 64, warps=4, stages=4)),
    Row("gate_up", _ALL, 16, True, Config(32, 32, 128, warps=4, stages=4)),
    Row("gate_up", _ALL, 16, True, Config(16, 32, 128, warps=4, stages=4)),
    Row("gate_up", _ALL, 16, True, Config(16, 16, 256, warps=4, stages=3)),
    Row("down", _HOPPER, 16, True, Config(128, 256, 64, warps=8, stages=3, tma=True)),
    Row("down", _HOPPER, 16, True, Config(128, 128, 64, warps=8, stages=3, tma=True)),
    Row("down", _HOPPER, 16, True, Config(64, 128, 64, warps=4, stages=4, tma=True)),
    Row("down", _HOPPER, 16, True, Config(64, 64, 64, warps=4, stages=4, tma=True)),
    Row("down", _AMPERE, 16, True, Config(128, 256, 32, warps=8, stages=4)),
    Row("down", _AMPERE, 16, True, Config(128, 128, 32, warps=8, stages=4)),
    Row("down", _AMPERE, 16, True, Config(64, 64, 64, warps=4, stages=4)),
    Row("down", _ALL, 16, True, Config(64, 32, 128, warps=4, stages=3)),
    Row("down", _ALL, 16, True, Config(32, 32, 128, warps=4, stages=4)),
    Row("down", _ALL, 16, True, Config(16, 64, 128, warps=4, stages=4)),
    Row("down", _ALL, 16, True, Config(16, 32, 128, warps=4, stages=4)),
    # of any size: loads of single elements through registers, so small tiles
    Row("gate_up", _ALL, 16, False, Config(64, 64, 32, warps=8, stages=2)),
    Row("gate_up", _ALL, 16, False, Config(16, 32, 64, warps=4, stages=2)),
    Row("down", _ALL, 16, False, Config(64, 64, 32, warps=8, stages=2)),
    Row("down", _ALL, 16, False, Config(16, 32, 64, warps=4, stages=2)),
    # float32, IEEE: fused multiply-adds of ordinary cores
    Row("gate_up", _ALL, 32, True, Config(64, 64, 32, warps=8, stages=3)),
    Row("gate_up", _ALL, 32, True, Config(16, 32, 64, warps=4, stages=3)),
    Row("down", _ALL, 32, True, Config(64, 64, 32, warps=8, stages=3)),
    Row("down", _ALL, 32, True, Config(16, 32, 64, warps=4, stages=3)),
    Row("gate_up", _ALL, 32, False, Config(32, 32, 32, warps=4, stages=2)),
    Row("gate_up", _ALL, 32, False, Config(16, 32, 32, warps=4, stages=2)),
    Row("down", _ALL, 32, False, Config(64, 64, 32, warps=8, stages=2)),
    Row("down", _ALL, 32, False, Config(16, 32, 32, warps=4, stages=2)),
)


def candidates(gemm: Gemm, arch: int) -> tuple[Config, ...]:
    """The table's configs for this kernel, dtype and alignment on an architecture, from the largest to the smallest.

    Raises:
        KernelError: the kernels do not compute in this dtype.
    """
    if gemm.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        name = str(gemm.dtype).removeprefix("torch.")
        raise KernelError(f"kernels for GPUs take float32, float16 and bfloat16, not {name}: cast the model")
    key = (gemm.kernel, gemm.dtype.itemsize * 8, gemm.aligned)
    return tuple(row.config for row in TABLE if (row.kernel, row.bits, row.aligned) == key and arch in row.arch)


def reach(rows: int, columns: int) -> float:
    """Fraction of a tensor core's rate that a tile is assumed to reach: 1 for 128 x 256.

    A tile loads ``rows + columns`` for each ``rows * columns`` that it multiplies; the root of that ratio is what the
    smaller tiles of published GEMMs lose.
    """
    return min(1.0, math.sqrt(rows * columns / (rows + columns) / (128 * 256 / (128 + 256))))
