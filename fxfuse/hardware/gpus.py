"""GPUs by their public figures. Nothing here was measured by us.

Sources: NVIDIA's data sheets "A100 80GB" (2021), "A10" (2021), "RTX A6000" (2021), "H100" (2023) and "H200" (2024),
dense rates without sparsity; multiprocessors from the architecture whitepapers; shared memory per thread block from the
CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability". Of the B100: NVIDIA's "Blackwell
Architecture Technical Brief" (2024), and, not told there, the multiprocessors of the B200.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fxfuse.errors import KernelError

SHARED_BYTES: Mapping[int, int] = {80: 166_912, 86: 101_376, 90: 232_448}
"""Shared memory that one program can have, in bytes, for each architecture that kernels are made for."""


WARPS = 48
"""Warps that a multiprocessor can hold, at least; sm_80 and sm_90 hold 64."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or as much of it as decides about tiles."""

    name: str
    capability: int
    """Compute capability: 90 is sm_90."""
    multiprocessors: int
    bandwidth: float = 0.0
    """Of device memory, bytes/s."""
    half_flops: float = 0.0
    """Dense float16 and bfloat16 with float32 sums, FLOP/s, on tensor cores."""
    float_flops: float = 0.0
    """IEEE float32, FLOP/s, not on tensor cores."""
    quarter_flops: float = 0.0
    """Dense float8 with float32 sums, FLOP/s; 0 if its tensor cores have none."""
    memory: float = 0.0
    """Of the device, bytes."""
    link: float = 0.0
    """NVLink to the other GPUs of its machine, both directions together, bytes/s; 0 if it has none."""

    @property
    def arch(self) -> int:
        """The architecture whose configs it runs: 80, 86 or 90.

        Raises:
            KernelError: it is older than sm_80.
        """
        if self.capability < 80:
            raise KernelError(f"fxfuse's kernels need a GPU of sm_80 or newer; {self.name} is sm_{self.capability}")
        # sm_87 and sm_100 have the shared memory of sm_80; sm_89 and sm_120 that of sm_86. Neither has wgmma.
        return {80: 80, 87: 80, 90: 90, 100: 80, 103: 80}.get(self.capability, 86)


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu("NVIDIA A100 80GB SXM", 80, 108, 2.039e12, 312e12, 19.5e12, 0, 80e9, 600e9),
    "a10": Gpu("NVIDIA A10", 86, 72, 0.600e12, 125e12, 31.2e12, 0, 24e9),
    "a6000": Gpu("NVIDIA RTX A6000", 86, 84, 0.768e12, 154.8e12, 38.7e12, 0, 48e9),
    "h100": Gpu("NVIDIA H100 80GB SXM", 90, 132, 3.35e12, 989.4e12, 66.9e12, 1978.9e12, 80e9, 900e9),
    "h200": Gpu("NVIDIA H200 141GB SXM", 90, 132, 4.8e12, 989.4e12, 66.9e12, 1978.9e12, 141e9, 900e9),
    "b100": Gpu("NVIDIA B100 192GB", 100, 148, 8e12, 1750e12, 60e12, 3500e12, 192e9, 1800e9),
}
"""GPUs by short name."""


def find(name: str) -> Gpu:
    """A GPU of `GPUS`.

    Raises:
        KernelError: there is no such name; the message lists those there are.
    """
    if name.lower() not in GPUS:
        raise KernelError(f"there are no figures for a GPU {name!r}; there are for {', '.join(GPUS)}")
    return GPUS[name.lower()]


def figures(gpu: Gpu) -> Gpu:
    """The same GPU with figures of its speed: its own if they are known, else those of one of its architecture.

    Raises:
        KernelError: it is older than sm_80.
    """
    words = gpu.name.lower().replace("-", " ").split()
    name = next((word for word in words if word in GPUS), {80: "a100", 86: "a10", 90: "h100"}[gpu.arch])
    return replace(GPUS[name], name=gpu.name, capability=gpu.capability, multiprocessors=gpu.multiprocessors)


@lru_cache
def of_device(device: torch.device) -> Gpu:
    """The GPU at a CUDA device; without figures of its speed.

    Raises:
        KernelError: the kernels were not made for it.
    """
    if torch.version.hip is not None:
        raise KernelError("fxfuse's kernels were made for NVIDIA's GPUs; on this one, leave the FFN to ATen")
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, properties.major * 10 + properties.minor, properties.multi_processor_count)
