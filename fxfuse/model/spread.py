"""Models whose weights are spread over processes: a process sees a part of each, and cannot tell what they compute."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor


def spread_weights(model: nn.Module) -> str:
    """That weights of ``model`` are spread over processes, and which, in words; an empty string if none is."""
    found = next((name for name, weight in model.named_parameters() if isinstance(weight, DTensor)), None)
    return f"the model's weights are spread over processes ({found} is a DTensor)" if found is not None else ""
