"""Linear maps on a CPU by oneDNN, without gradients: over a weight as it lies in memory, or over a prepacked one.

PyTorch's own float32 GEMMs on CPUs go to MKL, which does not use all that processors of other makers can do. oneDNN
writes code for the processor at hand, and reads weights fastest in a layout of its own, for which `prepack` makes a
copy. ``torch.ops.fxfuse.linear`` takes a weight, ``torch.ops.fxfuse.prepacked_linear`` such a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_LIBRARY = torch.library.Library("fxfuse", "FRAGMENT")  # its ops live as long as this object does
for _name in ("linear", "prepacked_linear"):
    _LIBRARY.define(
        f"{_name}(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", tags=(torch.Tag.needs_contiguous_strides,)
    )

_ROWS = 1
"""The number of rows for which oneDNN chooses the layout; it serves others as well."""


def available() -> bool:
    """Whether this build of PyTorch has oneDNN, and it is not switched off."""
    return bool(torch._C._has_mkldnn and torch.backends.mkldnn.enabled)


def computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of ``dtype`` on this processor."""
    if not available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def prepack(weight: Tensor) -> Tensor:
    """A copy of ``weight`` ``[out, in]`` for ``prepacked_linear``; of a tensor without values, a contiguous one.

    It is opaque: it has a shape and a dtype, and nothing but oneDNN can read it.
    """
    if weight.device.type != "cpu" or isinstance(weight, FakeTensor):
        return weight.contiguous()
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return made


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("prepacked_linear", _linear, "MkldnnCPU")
for _name in ("linear", "prepacked_linear"):
    torch.library.register_fake(f"fxfuse::{_name}", _shape, lib=_LIBRARY)
