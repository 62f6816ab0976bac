"""Measured configs instead of picked ones: tried on a real GPU once, and kept on disk.

The file's name holds what would make its numbers wrong elsewhere: the GPU, the versions of torch and Triton, the source
of the kernels. Its entries are shapes, with the number of tokens rounded up to a power of two.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache, lru_cache, partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from fxfuse._common.typed import typed
from fxfuse.errors import KernelError
from fxfuse.hardware.configs import COUNTERS, LOOP_ROWS, Config, Gemm, candidates
from fxfuse.hardware.gpus import Gpu
from fxfuse.hardware.pick import pick, splits
from fxfuse.kernels import clock, down, gate_up
from fxfuse.kernels.calls import Down, GateUp

Measure = Callable[[Config], float]
"""Seconds that a kernel takes with a config."""


def chosen(gemm: Gemm, gpu: Gpu) -> Config:
    """The measured config of a shape if there is one, else the one that `pick` picks.

    Raises:
        KernelError: this GPU or this dtype is not supported, or the file of measured configs is damaged.
    """
    known = _known(gpu)
    return (known.get(_key(gemm)) if known else None) or _picked(gemm, gpu)


def tune(gemm: Gemm, gpu: Gpu, measure: Measure) -> Config:
    """Measure every option, keep the fastest on disk, and let `chosen` choose it from now on.

    Args:
        gemm: the shape; it stands for all numbers of tokens down to the next lower power of two.
        gpu: the GPU on which ``measure`` measures.
        measure: see `stopwatch`.
    """
    best = min(options(_bucket(gemm), gpu), key=measure)
    path = cache_file(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {**_read(path), _key(gemm): best}
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({key: asdict(config) for key, config in sorted(known.items())}, indent=1))
    draft.replace(path)  # whole or not at all, whatever other processes do
    _known.cache_clear()
    return best


def options(gemm: Gemm, gpu: Gpu) -> tuple[Config, ...]:
    """Every config worth trying: the picked one first, then the table's, with every split of `down`'s depth."""
    found = [pick(gemm, gpu)]
    for config in candidates(gemm, gpu.arch):
        found += [replace(config, split=split) for split in splits(gemm, config, gpu, steps=1)]
    return tuple(dict.fromkeys(found))


def stopwatch(gemm: Gemm, device: torch.device, replays: int = 20) -> Measure:
    """A `Measure` on a CUDA device, for random tensors of this shape: the median of some replays, with a cold L2 cache.

    What is measured is what `launch` launches: large tiles are given the norm's factors, small ones take them along.
    Counters are zeroed once a replay, since kernel 1 zeroes them for nothing.
    """

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=gemm.dtype, device=device).div_(gemm.K**0.5)

    projections = (2,) if gemm.kernel == "gate_up" else ()
    size = math.prod(projections) * gemm.N * gemm.K * gemm.dtype.itemsize
    weights = [random(*projections, gemm.N, gemm.K) for _ in range(clock.copies(size, device))]
    inputs, out, factors = random(gemm.M, gemm.K), random(gemm.M, gemm.N), torch.ones(gemm.M, device=device)
    residual = random(gemm.M, gemm.N)
    counters = torch.zeros(max(clock.CALLS, len(weights)), COUNTERS, dtype=torch.int32, device=device)

    def once(config: Config, index: int) -> None:
        own, weight = counters[index], weights[index % len(weights)]
        if gemm.kernel == "gate_up":
            norm = {"eps": 1e-6} if config.rows <= LOOP_ROWS else {"rstd": factors}
            gate_up.launch(GateUp(inputs, weight, **norm), config, out, own).run()
            return
        if index == 0 and config.split > 1:
            counters.zero_()
        down.launch(Down(inputs, weight, residual), config, out, own).run()

    def measure(config: Config) -> float:
        calls = [partial(once, config, index) for index in range(len(counters))]
        return clock.seconds(calls, device, replays=replays)

    return measure


def cache_file(gpu: Gpu) -> Path:
    """Where measured configs are kept: in ``$FXFUSE_CACHE``, else in the user's cache folder."""
    own = os.environ.get("FXFUSE_CACHE")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxfuse"
    key = f"{gpu.name}|{gpu.multiprocessors}|torch {torch.__version__}|triton {triton.__version__}|{source_hash()}"
    return folder / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


@cache
def source_hash() -> str:
    """Of the Triton code: another source is another kernel."""
    files = (Path(__file__).with_name(f"{name}.py") for name in ("tiles", "gate_up", "down", "rstd"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


_picked = lru_cache(maxsize=4096)(pick)


@cache
def _known(gpu: Gpu) -> Mapping[str, Config]:
    return _read(cache_file(gpu))


def _read(path: Path) -> dict[str, Config]:
    try:
        return typed(dict[str, Config], json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise KernelError(f"{path} is no file of measured configs ({error}); delete it to measure again") from error


def _bucket(gemm: Gemm) -> Gemm:
    """The largest shape that an entry stands for: what a config may do, it must be allowed to do there."""
    return replace(gemm, M=1 << (gemm.M - 1).bit_length())


def _key(gemm: Gemm) -> str:
    gemm = _bucket(gemm)
    aligned = "aligned" if gemm.aligned else "any"
    return f"{gemm.kernel} {gemm.M}x{gemm.N}x{gemm.K} {str(gemm.dtype).removeprefix('torch.')} {aligned}"
