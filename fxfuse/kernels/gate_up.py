"""Kernel 1: norm, gate and up, activation. ``act(gate(n)) * up(n)`` for one tile of tokens and hidden units.

The norm's factor of a token commutes with the GEMM, so it is applied to the accumulators, and the tokens are multiplied
as they are: all FFNs of a wide one read the same tile, and the norm costs no pass over memory. The factor comes as a
vector (``rstd``), or the sums of squares are taken along in the loop (``eps``).

Two forms. `pointer_kernel` runs everywhere: two dots a step, one for the gate and one for the up rows. `tma_kernel`
(sm_90) brings both in one 3-D block of the plain ``[2, F, d]`` weight and multiplies it in one dot, wgmma of twice the
width; it needs rows whose length is a multiple of 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fxfuse.hardware.configs import COUNTERS, GROUP, Config
from fxfuse.kernels.calls import GateUp
from fxfuse.kernels.launches import Launch
from fxfuse.kernels.tiles import activate, corner, place, squares


@triton.jit
def _row_factor(rstd_ptr, eps, sums, rows, M, d):
    """1 / rms of each token of the tile; None if the tokens are not normalised here."""
    if rstd_ptr is not None:
        return tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
    elif eps is not None:
        return tl.rsqrt(sums / d + eps)
    else:
        return None


@triton.jit
def _projected(acc, factor, bias_ptr, columns, F):
    if factor is not None:
        acc = acc * factor[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < F, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _gained(x, gain_ptr, depth, d):
    """``x * gain``, rounded to the dtype of x: what a tensor core multiplies."""
    gain = tl.load(gain_ptr + depth, mask=depth < d, other=0.0).to(tl.float32)
    return (x.to(tl.float32) * gain[None, :]).to(x.dtype)


@triton.jit
def _clear(counters_ptr, tile, COUNTERS: tl.constexpr):
    """The first program zeroes what kernel 2 counts in, which saves a launch that would."""
    if counters_ptr is not None:
        if tile == 0:
            tl.store(counters_ptr + tl.arange(0, COUNTERS), 0)


@triton.jit(do_not_specialize=["M"])
def pointer_kernel(
    x_ptr, weight_ptr, bias_ptr, gain_ptr, rstd_ptr, out_ptr, counters_ptr,
    M, F, d, x_stride, weight_stride, up_offset, eps,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, COUNTERS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out [M, F]`` of ``x [M, d]`` and ``weight [2, F, d]``, or ``[1, F, d]`` where it is not GATED."""
    row, column, tile = place(M, F, BM, BN, GROUP)
    rows, columns, depth = row + tl.arange(0, BM), column + tl.arange(0, BN), tl.arange(0, BK)
    x_tile = corner(x_ptr, row, x_stride) + tl.arange(0, BM)[:, None] * x_stride + depth[None, :]
    gates = corner(weight_ptr, column, weight_stride) + tl.arange(0, BN)[None, :] * weight_stride + depth[:, None]
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    for k in range(0, d, BK):
        x = tl.load(x_tile, mask=(rows < M)[:, None] & (depth < d - k)[None, :], other=0.0)
        if eps is not None:
            sums += squares(x)
        if gain_ptr is not None:
            x = _gained(x, gain_ptr, k + depth, d)
        inside = (depth < d - k)[:, None] & (columns < F)[None, :]
        gate = tl.dot(x, tl.load(gates, mask=inside, other=0.0), gate, input_precision="ieee")
        if GATED:
            up = tl.dot(x, tl.load(gates + up_offset, mask=inside, other=0.0), up, input_precision="ieee")
        x_tile += BK
        gates += BK
    factor = _row_factor(rstd_ptr, eps, sums, rows, M, d)
    hidden = activate(_projected(gate, factor, bias_ptr, columns, F), ACTIVATION)
    if GATED:
        hidden *= _projected(up, factor, bias_ptr if bias_ptr is None else bias_ptr + F, columns, F)
    _clear(counters_ptr, tile, COUNTERS)
    out = corner(out_ptr, row, F) + tl.arange(0, BM)[:, None] * F + columns[None, :]
    tl.store(out, hidden.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < F)[None, :])


@triton.jit(do_not_specialize=["M"])
def tma_kernel(
    x_desc, weight_desc, bias_ptr, gain_ptr, rstd_ptr, out_desc, counters_ptr,
    M, F, d, eps,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, COUNTERS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same through tensor descriptors, which read zeros outside and write nothing there."""
    row, column, tile = place(M, F, BM, BN, GROUP)
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    projections: tl.constexpr = 2 if GATED else 1
    both = tl.zeros((BM, projections * BN), tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    for k in range(0, d, BK):
        x = x_desc.load([row, k])
        if eps is not None:
            sums += squares(x)
        if gain_ptr is not None:
            x = _gained(x, gain_ptr, k + tl.arange(0, BK), d)
        weight = tl.reshape(weight_desc.load([0, column, k]), (projections * BN, BK))
        both = tl.dot(x, weight.T, both, input_precision="ieee")
    factor = _row_factor(rstd_ptr, eps, sums, rows, M, d)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(both, (BM, 2, BN)), (0, 2, 1)))
        hidden = activate(_projected(gate, factor, bias_ptr, columns, F), ACTIVATION)
        hidden *= _projected(up, factor, bias_ptr if bias_ptr is None else bias_ptr + F, columns, F)
    else:
        hidden = activate(_projected(both, factor, bias_ptr, columns, F), ACTIVATION)
    _clear(counters_ptr, tile, COUNTERS)
    out_desc.store([row, column], hidden.to(out_desc.dtype))


def launch(call: GateUp, config: Config, out: Tensor, counters: Tensor | None = None) -> Launch:
    """How to compute ``out [M, F]`` from a call whose tokens are ``[M, d]``, with ``M > 0``.

    Args:
        call: rows of x and of the weight must be contiguous; ``rstd``, ``bias`` and ``gain`` altogether.
        config: the tiles.
        out: contiguous, of x's dtype.
        counters: int32 ``[COUNTERS]``, zeroed along the way; those of the `down` kernel that follows.
    """
    (M, d), (projections, F, _) = call.x.shape, call.weight.shape
    shared = {
        "bias_ptr": call.bias,
        "gain_ptr": call.gain,
        "rstd_ptr": call.rstd,
        "counters_ptr": counters,
        "M": M,
        "F": F,
        "d": d,
        "eps": call.eps,
        "GATED": call.gated,
        "ACTIVATION": call.activation,
        "COUNTERS": COUNTERS,
        "BM": config.rows,
        "BN": config.columns,
        "BK": config.depth,
        "GROUP": GROUP,
    }
    grid = (-(-M // config.rows) * -(-F // config.columns),)
    if config.tma:
        own = {
            "x_desc": TensorDescriptor.from_tensor(call.x, [config.rows, config.depth]),
            "weight_desc": TensorDescriptor.from_tensor(call.weight, [projections, config.columns, config.depth]),
            "out_desc": TensorDescriptor.from_tensor(out, [config.rows, config.columns]),
        }
        return Launch(tma_kernel, grid, {**own, **shared}, config.warps, config.stages)
    strides = {"x_stride": call.x.stride(0), "weight_stride": call.weight.stride(1), "up_offset": call.weight.stride(0)}
    pointers = {"x_ptr": call.x, "weight_ptr": call.weight, "out_ptr": out}
    return Launch(pointer_kernel, grid, {**pointers, **strides, **shared}, config.warps, config.stages)
