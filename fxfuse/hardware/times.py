"""Modelled time of one GEMM, ours and a vendor's.

A GEMM takes the longer of moving its bytes and of its waves of tiles; a launch adds what starting and draining a grid
costs inside a CUDA graph. Bytes move at the memory's rate only if enough of them are on the way at once, which takes
programs and stages.

Sources: `gpus` for the hardware. The memory's latency is three times that of an idle GPU, about 480 cycles (arXiv
2402.13499). Everything else in `Assumptions` is judgement, and nobody measured it here.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from itertools import product

import torch

from fxfuse.hardware.configs import MANY_TOKENS, Config, Gemm, reach
from fxfuse.hardware.gpus import SHARED_BYTES, WARPS, Gpu


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says."""

    bandwidth: float = 0.9
    """Fraction of the memory's bandwidth that a good kernel reaches."""
    flops: float = 0.7
    """Fraction of the peak that a vendor's large GEMM reaches with the best tile."""
    own: float = 0.9
    """What Triton's code reaches of that with the same tile."""
    latency: float = 0.9e-6
    """Of memory under load, seconds: bandwidth times latency is how many bytes must be on the way at once."""
    join: float = 1.0e-6
    """What it takes the last program of a split depth to find out that it is the last, seconds."""
    alone: float = 3.0
    """How many times its share of the memory's bandwidth one multiprocessor can draw from L2."""
    gemm_launch: float = 4.0e-6
    """Starting and draining the grid of a GEMM, seconds."""
    pass_launch: float = 2.5e-6
    """The same for a kernel that reads each element once, seconds."""
    all_reduce_bandwidth: float = 257e9
    """Of all-reduces larger than those of the table, bytes/s."""
    library_tiles: tuple[tuple[int, int], ...] = ((128, 256), (128, 128), (64, 128), (64, 64))
    """What a vendor's GEMM chooses from; with few tokens it is assumed to have kernels that waste nothing."""
    library_splits: tuple[int, ...] = (1, 2, 4, 8)
    """By how many it splits the depth, for nothing."""


USUAL = Assumptions()


@dataclass(frozen=True)
class Estimate:
    """What some work costs on each GPU, modelled. Estimates of work done one after the other add up."""

    seconds: float
    bytes: int = 0
    """Read from and written to device memory."""
    flops: int = 0
    launches: int = 0
    all_reduces: int = 0
    waves: float = 0.0
    """Tiles of GEMMs for each multiprocessor."""

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(*(own + its for own, its in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Estimate:
        return Estimate(*(own * times for own in astuple(self)))


def own_gemm(gemm: Gemm, config: Config, gpu: Gpu, assume: Assumptions = USUAL) -> Estimate:
    """One of our kernels: kernel 1 with its activation, kernel 2 with the residual."""
    M, N, K, projections = gemm.M, gemm.N, gemm.K, _projections(gemm)
    added = M * N if gemm.kernel == "down" else 0
    moved = gemm.dtype.itemsize * (M * K + projections * N * K + M * N + added)
    programs = config.tiles(gemm) * config.split
    waves = programs / gpu.multiprocessors
    memory = moved / (gpu.bandwidth * assume.bandwidth * _streaming(gemm, config, gpu, assume))
    products = _wave(config.rows, projections * config.columns, K / config.split, gemm.dtype, gpu, assume)
    seconds = max(memory, products * math.ceil(waves) / assume.own) + assume.gemm_launch
    if config.split > 1:
        seconds += _joining(config, programs, gpu, assume)
    return Estimate(seconds, moved, 2 * M * projections * N * K, launches=1, waves=waves)


def library_gemm(gemm: Gemm, gpu: Gpu, assume: Assumptions = USUAL) -> Estimate:
    """The same product, without activation and residual, with the best of a vendor's tiles."""
    M, N, K = gemm.M, _projections(gemm) * gemm.N, gemm.K
    moved = gemm.dtype.itemsize * (M * K + N * K + M * N)
    memory = moved / (gpu.bandwidth * assume.bandwidth)
    options = []
    for (rows, columns), split in product(assume.library_tiles, assume.library_splits):
        waves = math.ceil(M / rows) * math.ceil(N / columns) * split / gpu.multiprocessors
        products = _wave(rows, columns, K / split, gemm.dtype, gpu, assume) * math.ceil(waves)
        if M <= MANY_TOKENS:
            products = 2 * M * N * K / (assume.flops * peak(gemm.dtype, gpu))
        options.append((max(memory, products), waves))
    seconds, waves = min(options)
    return Estimate(seconds + assume.gemm_launch, moved, 2 * M * N * K, launches=1, waves=waves)


def ideal(gemm: Gemm, gpu: Gpu) -> float:
    """No kernel is faster, seconds: weights and tokens move once, or all products at the peak."""
    M, N, K = gemm.M, _projections(gemm) * gemm.N, gemm.K
    moved = gemm.dtype.itemsize * (M * K + N * K + M * gemm.N)
    return max(moved / gpu.bandwidth, 2 * M * N * K / peak(gemm.dtype, gpu))


def _projections(gemm: Gemm) -> int:
    """Kernel 1 multiplies twice as many columns as it writes."""
    return 2 if gemm.kernel == "gate_up" else 1


def _streaming(gemm: Gemm, config: Config, gpu: Gpu, assume: Assumptions) -> float:
    """Fraction of the memory's rate at which a grid can read weights; tokens are in L2.

    In a part of a wave, the multiprocessors at work cannot draw all of it; nor can programs of too few stages.
    """
    columns, item = _projections(gemm) * config.columns, gemm.dtype.itemsize
    shared = config.stages * (config.rows + columns) * config.depth * item
    resident = gpu.multiprocessors * max(1, min(SHARED_BYTES[gpu.arch] // shared, WARPS // config.warps))
    programs = config.tiles(gemm) * config.split
    on_the_way = min(programs, resident) * (config.stages - 1) * columns * config.depth * item
    return min(1.0, programs / gpu.multiprocessors, on_the_way / (gpu.bandwidth * assume.latency))


def _joining(config: Config, programs: int, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds in which the parts of a split depth are written, and those of each tile read by its last program."""
    part = 4 * config.rows * config.columns  # float32
    written = programs * part / (gpu.bandwidth * assume.bandwidth)
    read = config.split * part / (assume.alone * gpu.bandwidth / gpu.multiprocessors)
    return assume.join + written + read


def _wave(rows: int, columns: int, depth: float, dtype: torch.dtype, gpu: Gpu, assume: Assumptions) -> float:
    """Seconds in which every multiprocessor multiplies one tile, by a vendor's code."""
    rate = assume.flops * reach(rows, columns) * peak(dtype, gpu) / gpu.multiprocessors
    return 2 * rows * columns * depth / rate


def peak(dtype: torch.dtype, gpu: Gpu) -> float:
    return gpu.float_flops if dtype == torch.float32 else gpu.half_flops
