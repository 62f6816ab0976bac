"""Linear maps of oneDNN on CPUs: its ops have private names, and no public function calls them as wanted.

Seen on torch 2.13.0.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def available() -> bool:
    """Whether this build of PyTorch has oneDNN, and it is not switched off; the public flag is the switch alone."""
    return bool(torch._C._has_mkldnn and torch.backends.mkldnn.enabled)


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of ``dtype`` on this processor, which only its own ops tell."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def reordered(weight: Tensor, rows: int) -> Tensor:
    """A copy of a contiguous weight ``[out, in]`` in oneDNN's layout for so many rows."""
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return made


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map over a weight in any layout: ``F.linear`` sends float32 to MKL."""
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made
