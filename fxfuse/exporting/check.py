"""The proof of an export: what the written folder computes is what the planned model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxfuse.errors import ExportError
from fxfuse.exporting.request import Request
from fxfuse.exporting.stream import Planned


def check_folder(folder: Path, kind: Any, planned: Planned, request: Request) -> None:
    """Load ``folder`` and compare its logits of the example with those of the planned graph.

    Args:
        folder: what was written, complete but for its name.
        kind: the class that loads it: that of the modelling file in it.
        planned: the model and its plan.
        request: the example.

    Raises:
        ExportError: weights are missing or are not used, or logits differ by more than rounding.
    """
    dtype = next(weight.dtype for weight in request.model.parameters() if weight.is_floating_point())
    config: Any = request.model.config
    chosen = {key: getattr(config, f"_{key}", None) for key in ("attn_implementation", "experts_implementation")}
    ways = {key: way for key, way in chosen.items() if isinstance(way, str)}  # kernels that round as the model's do
    made, told = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True, **ways)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if told.get(what):
            raise ExportError(f"of what was written, {what} when it is loaded: {sorted(map(str, told[what]))[:3]}")
    device = next(request.model.parameters()).device
    with torch.no_grad():
        found: Tensor = made.eval().to(device)(**request.example).logits
        outputs = planned.edited(*planned.inputs)
    wanted: Tensor = outputs[0]
    difference = relative_difference(found, wanted)
    if not difference <= torch.finfo(dtype).eps ** 0.5:
        raise ExportError(
            f"what was written computes other logits than the planned model: they differ by {difference:.2g} of the "
            "largest. The model has something that its graph does not show to this format, and nothing was kept"
        )


def relative_difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a part of the largest value; infinite if shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    scale = other.double().abs().max().clamp_min(1e-30)
    return float((one.double() - other.double()).abs().max() / scale)
