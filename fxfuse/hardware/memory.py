"""Where a model fits: weights and cache on each GPU, and what packing wide FFNs needs on top.

Packing is exact arithmetic of `fxfuse.packing`; a checkpoint that was exported with its wide FFNs needs none of it.
Source of the share of a GPU that is used: vLLM's default, ``gpu_memory_utilization=0.9``.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxfuse.hardware.decode import ACTIVATION, BYTES, Setting
from fxfuse.hardware.layout import Layout

USED = 0.9
"""Share of a GPU's memory that weights and cache may take; the rest is for activations, graphs and buffers."""


@dataclass(frozen=True)
class Memory:
    """Of each GPU, bytes.

    Attributes:
        usable: what weights and cache may take.
        weights: of the model.
        token: of the cache, for a token of one sequence.
        copied: what packed weights beside the model's own take for good, under ``weights="copy"``.
        spike: what exists for a moment while one pack is made, at most: gate and up of the largest group, once more.
            Under ``"copy"`` with the gains of norms multiplied in, before they are joined; under ``"share"`` joined,
            before the model's own are let go.
    """

    usable: float
    weights: float
    token: float
    copied: float = 0.0
    spike: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether the weights fit."""
        return self.weights <= self.usable

    @property
    def tokens(self) -> int | None:
        """How many tokens of all sequences the cache has room for; None if the model keeps no cache."""
        return int(max(0.0, self.usable - self.weights) / self.token) if self.token else None


def memory(layout: Layout, setting: Setting) -> Memory:
    """Of a model that is divided among the GPUs of ``setting``, whose batch and context do not matter."""
    gpus, size = setting.tensor_parallel, BYTES[setting.precision]
    wide = [part.run[0] for part in layout.parts if part.wide]
    return Memory(
        usable=USED * setting.gpu.memory,
        weights=layout.weights * size / gpus,
        token=sum(ACTIVATION * shape.cache / min(gpus, shape.heads) for shape in layout.shapes),
        copied=sum(ffn.weights for ffn in wide) * size / gpus,
        spike=max((ffn.weights - layout.d * ffn.width for ffn in wide), default=0) * size / gpus,
    )
