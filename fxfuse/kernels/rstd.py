"""The statistics of an RMS norm as a kernel of their own: ``1 / sqrt(mean(x^2) + eps)`` of each token.

With many tokens, every tile of hidden units would take the same sums again inside its GEMM, where wgmma wants them
in shared memory and the sum in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fxfuse.kernels.launches import Launch
from fxfuse.kernels.tiles import corner

_DEPTH = 1024


@triton.jit(do_not_specialize=["M"])
def kernel(x_ptr, out_ptr, M, d, x_stride, eps, BK: tl.constexpr):
    """``out [M]``, float32, of ``x [M, d]``; one token a program."""
    row = tl.program_id(0)
    x_row = corner(x_ptr, row, x_stride)
    sums = tl.zeros((BK,), tl.float32)
    for k in range(0, d, BK):
        depth = k + tl.arange(0, BK)
        x = tl.load(x_row + depth, mask=depth < d, other=0.0).to(tl.float32)
        sums += x * x
    tl.store(out_ptr + row, tl.rsqrt(tl.sum(sums, axis=0) / d + eps))


def launch(x: Tensor, eps: float, out: Tensor) -> Launch:
    """How to compute ``out [M]``, float32, from tokens ``x [M, d]`` with contiguous rows and ``M > 0``."""
    M, d = x.shape
    arguments = {"x_ptr": x, "out_ptr": out, "M": M, "d": d, "x_stride": x.stride(0), "eps": eps, "BK": _DEPTH}
    return Launch(kernel, (M,), arguments, warps=4, stages=2)
