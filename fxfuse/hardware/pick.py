"""Which config for which shape, by arithmetic: the one whose modelled time is the shortest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fxfuse.hardware.configs import COUNTERS, CROWD, MANY_TOKENS, MAX_SPLIT, Config, Gemm, candidates
from fxfuse.hardware.gpus import Gpu, figures
from fxfuse.hardware.times import own_gemm

STEPS = 4
"""Steps of the depth that every program keeps at least: fewer do not fill its pipeline."""


def pick(gemm: Gemm, gpu: Gpu) -> Config:
    """The config with the shortest modelled time; of several, the largest tile.

    Raises:
        KernelError: this GPU or this dtype is not supported.
    """
    known = figures(gpu)
    return min(reasonable(gemm, gpu), key=lambda config: own_gemm(gemm, config, known).seconds)


def reasonable(gemm: Gemm, gpu: Gpu) -> Iterator[Config]:
    """Configs that read no weight much oftener than need be, each with every split of the depth that makes sense.

    The model takes what several rows of tiles read for one read, since the others find it in L2; that is not to be
    stretched.
    """
    configs = candidates(gemm, gpu.arch)
    tallest = max(config.rows for config in configs)
    needed = min((config.rows for config in configs if config.rows >= gemm.M), default=tallest)
    for config in configs:
        several = -(-gemm.M // config.rows) > 2 and config.rows < MANY_TOKENS
        if config.rows <= needed and not (several and config.rows < needed):
            yield from (replace(config, split=split) for split in splits(gemm, config, gpu))


def splits(gemm: Gemm, config: Config, gpu: Gpu, steps: int = STEPS) -> list[int]:
    """By how many the depth can be split: powers of two, as long as programs have something to do, and counters."""
    tiles = config.tiles(gemm)
    if gemm.kernel == "gate_up" or tiles > COUNTERS:
        return [1]
    most = min(MAX_SPLIT, -(-gemm.K // config.depth) // steps, CROWD * gpu.multiprocessors // tiles)
    return [2**power for power in range(max(1, most.bit_length()))]
