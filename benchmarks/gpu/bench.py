"""What a part of the benchmark is given, and how it hands on what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from fxfuse.hardware import gpus
from fxfuse.hardware.gpus import Gpu

Value: TypeAlias = str | int | float | bool
Row: TypeAlias = dict[str, Value]
"""One line of the results."""

Emit: TypeAlias = Callable[[Row], None]
"""Writes a row at once."""


@dataclass(frozen=True)
class Card:
    """The GPU here, with figures of its data sheet."""

    gpu: Gpu
    memory: int
    """Bytes."""

    @classmethod
    def here(cls) -> Card | None:
        """None if there is no GPU. Asking starts CUDA, and what has started it cannot be forked."""
        if not torch.cuda.is_available():
            return None
        device = torch.device("cuda", 0)
        return cls(gpus.figures(gpus.of_device(device)), torch.cuda.get_device_properties(device).total_memory)


REHEARSED = Card(replace(gpus.find("h100"), name="rehearsal"), 0)


@dataclass(frozen=True)
class Bench:
    """Where a part runs, for how long, and what earlier parts found.

    Attributes:
        card: the GPU; `REHEARSED` for tiny shapes on the CPU, where the code is tried, and nothing measured.
        ends: when the part is to be over, by ``time.monotonic``.
        rows: of the parts before.
    """

    card: Card
    ends: float
    rows: tuple[Row, ...] = ()

    @property
    def rehearsed(self) -> bool:
        return self.card is REHEARSED

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearsed else "cuda:0")

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16; where kernels are interpreted float16, in which Triton's interpreter is right."""
        return torch.float16 if self.rehearsed else torch.bfloat16

    @property
    def inner(self) -> str:
        """The compiler to compare with; one that takes no time where there is nothing to measure."""
        return "aot_eager" if self.rehearsed else "inductor"

    @property
    def left(self) -> float:
        """Seconds until the part is to be over."""
        return self.ends - time.monotonic()

    @property
    def ceilings(self) -> Gpu:
        """The GPU with the bandwidth and the GEMM rate that part a measured; those of its data sheet if it did not."""
        found = {str(row["what"]): row for row in self.rows if "what" in row}
        if not {"copy", "GEMM"} <= found.keys():
            return self.card.gpu
        bandwidth, flops = float(found["copy"]["GB/s"]) * 1e9, float(found["GEMM"]["TFLOP/s"]) * 1e12
        return replace(self.card.gpu, bandwidth=bandwidth, half_flops=flops)


def attempt(emit: Emit, row: Mapping[str, Value], measure: Callable[[], Row]) -> None:
    """Emit ``row`` with what ``measure`` finds, or with its error, which makes the whole run fail in the end."""
    try:
        emit({**row, **measure()})
    except Exception as error:
        emit({**row, "error": f"{type(error).__name__}: {error}"[:600]})
