"""Linear maps on a CPU by oneDNN, without gradients: over a weight as it lies in memory, or over a prepacked one.

PyTorch's own float32 GEMMs on CPUs go to MKL, which does not use all that processors of other makers can do. oneDNN
writes code for the processor at hand, and reads weights fastest in a layout of its own, for which `prepack` makes a
copy. ``torch.ops.fxfuse.linear`` takes a weight, ``torch.ops.fxfuse.prepacked_linear`` such a copy. Where oneDNN cannot
multiply a dtype, as bfloat16 on processors with no more than AVX2, both are PyTorch's own, over the weight as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse._torch import onednn
from fxfuse._torch.fake import FakeTensor

_LIBRARY = torch.library.Library("fxfuse", "FRAGMENT")  # its ops live as long as this object does
for _name in ("linear", "prepacked_linear"):
    _LIBRARY.define(
        f"{_name}(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", tags=(torch.Tag.needs_contiguous_strides,)
    )

_ROWS = 1
"""The number of rows for which oneDNN chooses the layout; it serves others as well."""


def computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, and multiplies matrices of ``dtype`` on this processor."""
    return onednn.available() and onednn.multiplies(dtype)


def prepack(weight: Tensor) -> Tensor:
    """A copy of ``weight`` ``[out, in]`` for ``prepacked_linear``, opaque: nothing but oneDNN can read it.

    Of a tensor without values, or of a dtype that oneDNN does not multiply here, the weight itself, contiguous.
    """
    if weight.device.type != "cpu" or isinstance(weight, FakeTensor) or not computes(weight.dtype):
        return weight.contiguous()
    return onednn.reordered(weight.contiguous(), _ROWS)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not weight.is_mkldnn and not computes(x.dtype):
        return F.linear(x, weight, bias)
    return onednn.linear(x, weight, bias)


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY.impl("prepacked_linear", _linear, "MkldnnCPU")
for _name in ("linear", "prepacked_linear"):
    _LIBRARY.impl(_name, _linear, "CPU")
    torch.library.register_fake(f"fxfuse::{_name}", _shape, lib=_LIBRARY)
