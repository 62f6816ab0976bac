"""``torch.ops.fxfuse.linear``: a linear map on a CPU by oneDNN, over the weight as it lies in memory.

PyTorch's own float32 GEMMs on CPUs go to MKL, which does not use all that processors of other makers can do. oneDNN
writes code for the processor at hand. Inference only: the op has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fxfuse", "FRAGMENT")  # its op lives as long as this object does
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", tags=(torch.Tag.needs_contiguous_strides,)
)


def available() -> bool:
    """Whether this build of PyTorch has oneDNN."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY.impl("linear", _linear, "CPU")
torch.library.register_fake("fxfuse::linear", _shape, lib=_LIBRARY)
