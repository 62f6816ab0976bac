"""Part a: the machine, and the two ceilings that everything else is compared with."""

from __future__ import annotations

import platform
import shutil
import subprocess
from functools import partial
from importlib import metadata

import torch

from benchmarks.gpu.bench import Bench, Emit, Row
from fxfuse.bench.timing import Machine
from fxfuse.kernels.clock import repeated, seconds


def run(bench: Bench, emit: Emit) -> None:
    emit({"what": "machine", **_software(), **({} if bench.rehearsed else _gpu(bench.device))})
    emit({"what": "copy", "GB/s": round(copied(bench) / 1e9, 1)})
    emit({"what": "GEMM", "TFLOP/s": round(multiplied(bench) / 1e12, 3)})


def copied(bench: Bench) -> float:
    """Bytes/s of a large copy on the device, read and written."""
    count = 1 << (16 if bench.rehearsed else 31)
    source = torch.empty(count, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    return 2 * count / seconds(repeated([partial(target.copy_, source)]), bench.device)


def multiplied(bench: Bench) -> float:
    """FLOP/s of a large product of random bfloat16 matrices; zeros would be faster."""
    size = 64 if bench.rehearsed else 8192
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / seconds(repeated([partial(torch.mm, left, right, out=out)]), bench.device)


def _software() -> Row:
    versions = {name: metadata.version(name) for name in ("torch", "triton", "transformers", "numpy")}
    return {**versions, "python": platform.python_version(), "cpu": str(Machine.here())}


def _gpu(device: torch.device) -> Row:
    found = torch.cuda.get_device_properties(device)
    return {
        "gpu": found.name,
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "capability": found.major * 10 + found.minor,
        "multiprocessors": found.multi_processor_count,
        "memory bytes": found.total_memory,
        "L2 bytes": found.L2_cache_size,
    }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown: there is no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
