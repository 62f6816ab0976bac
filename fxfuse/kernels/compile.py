"""What a launch compiles to, without a GPU: registers, spills, shared memory, instructions.

The launch is made of meta tensors by the same code that launches on a GPU, so what is compiled is what would run.
Nothing is measured here. Compiling does not fail on spills or on too much shared memory; `Compiled` tells.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import CompiledKernel

from fxfuse.errors import KernelError
from fxfuse.kernels.launches import Launch

INSTRUCTIONS: Mapping[str, str] = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "cp.async": r"cp\.async\.c[ag]\.",
    "tma load": r"cp\.async\.bulk\.tensor\.\dd\.shared",
    "tma store": r"cp\.async\.bulk\.tensor\.\dd\.global",
    "atom": r"\b(?:atom|red)\.",
}
"""Instructions of PTX that say which path a kernel takes, by what to look for."""


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture."""

    name: str
    capability: int
    registers: int
    """Per thread; 255 is the most there is."""
    spilled_bytes: int
    """Stores of registers to local memory, bytes per thread."""
    shared_bytes: int
    """Shared memory of a program."""
    instructions: Mapping[str, int]
    """How often each of `INSTRUCTIONS` stands in the code."""
    ptx: str


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile a launch for sm_``capability``; its tensors may be meta tensors.

    Raises:
        KernelError: the process interprets its kernels, or the assembler refused what Triton made.
    """
    kernel = warm(launch, capability)
    ptx = str(kernel.asm["ptx"])
    report = _assemble(ptx, capability)
    return Compiled(
        name=f"{launch.kernel.__module__.rpartition('.')[2]}.{launch.kernel.__name__}",
        capability=capability,
        registers=_number(r"Used (\d+) registers", report),
        spilled_bytes=_number(r"(\d+) bytes spill stores", report),
        shared_bytes=int(kernel.metadata.shared),
        instructions={name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
        ptx=ptx,
    )


def warm(launch: Launch, capability: int) -> CompiledKernel:
    """Let Triton compile a launch for sm_``capability``, and keep the result on disk: a GPU then finds it there.

    Raises:
        KernelError: the process interprets its kernels.
    """
    if triton.knobs.runtime.interpret:
        raise KernelError("kernels are interpreted in this process (TRITON_INTERPRET=1); compile them in another")
    with _target(capability):
        return launch.kernel.warmup(
            **launch.arguments, grid=launch.grid, num_warps=launch.warps, num_stages=launch.stages
        )


class _NoDevice:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def _target(capability: int) -> Iterator[None]:
    config = triton.runtime.driver
    before = config._active
    config.set_active(_NoDevice(capability))
    try:
        yield
    finally:
        config._active = before


def _assemble(ptx: str, capability: int) -> str:
    """What Triton's own ptxas says about the code."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", "--regAllocOptLevel=2", str(source), "-o", f"{folder}/kernel.o"]
        command.append(f"--gpu-name={sm_arch_from_capability(capability)}")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(f"the assembler refused the kernel for sm_{capability}: {done.stderr.strip()}")
    return done.stderr


def _number(pattern: str, report: str) -> int:
    found = re.search(pattern, report)
    if found is None:
        raise KernelError(f"the assembler's report has changed: it has no {pattern!r}")
    return int(found[1])
