"""A launch: a Triton kernel with everything it is given. It can be run on a GPU, interpreted, or only compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Launch:
    """One launch, not yet made."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | TensorDescriptor | float | str | None]
    warps: int
    stages: int

    def run(self) -> None:
        """Launch it, on the current stream of the current device."""
        self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)
