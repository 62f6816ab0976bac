"""Kernel 2: down projection, bias and residual add.

Its tiles do not grow with the number of FFNs that were fused, its depth does: with few tokens there are fewer tiles
than multiprocessors, so a tile's depth is split among several programs. Each writes its float32 part to a workspace and
counts itself in; the last to arrive adds the parts up, in the order of the depth and not of arrival. So results are the
same bits in every run, and there are no atomics on data.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fxfuse.hardware.configs import GROUP, Config
from fxfuse.kernels.calls import Down
from fxfuse.kernels.launches import Launch
from fxfuse.kernels.tiles import corner, place


@triton.jit
def _share(K, BK: tl.constexpr, SPLIT: tl.constexpr):
    """The part of the depth that is this program's: whole steps; for the last programs perhaps none."""
    steps = tl.cdiv(tl.cdiv(K, BK), SPLIT)
    begin = tl.program_id(1) * steps * BK
    return begin, tl.minimum(begin + steps * BK, K)


@triton.jit
def _store(
    acc, residual_ptr, bias_ptr, out_ptr, row, column, M, N, residual_stride, BM: tl.constexpr, BN: tl.constexpr
):
    """Add bias and residual, round once. Half a wide tile at a time: the addresses of all of it would spill."""
    if BN > 128:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        _add_and_store(left, residual_ptr, bias_ptr, out_ptr, row, column, M, N, residual_stride, BM, BN // 2)
        column += BN // 2
        _add_and_store(right, residual_ptr, bias_ptr, out_ptr, row, column, M, N, residual_stride, BM, BN // 2)
    else:
        _add_and_store(acc, residual_ptr, bias_ptr, out_ptr, row, column, M, N, residual_stride, BM, BN)


@triton.jit
def _add_and_store(
    acc, residual_ptr, bias_ptr, out_ptr, row, column, M, N, residual_stride, BM: tl.constexpr, BN: tl.constexpr
):
    columns = column + tl.arange(0, BN)
    inside = (row + tl.arange(0, BM) < M)[:, None] & (columns < N)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual = corner(residual_ptr, row, residual_stride) + tl.arange(0, BM)[:, None] * residual_stride
        acc += tl.load(residual + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    out = corner(out_ptr, row, N) + tl.arange(0, BM)[:, None] * N + columns[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    acc, residual_ptr, bias_ptr, out_ptr, parts_ptr, counters_ptr, row, column, tile, M, N, residual_stride,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Store the tile; where the depth is split, the last program that arrives does."""
    if SPLIT == 1:
        _store(acc, residual_ptr, bias_ptr, out_ptr, row, column, M, N, residual_stride, BM, BN)
    else:
        parts = corner(parts_ptr, tile * SPLIT, BM * BN) + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        # Past L1, which other multiprocessors do not see.
        tl.store(parts + tl.program_id(1) * (BM * BN), acc, cache_modifier=".cg")
        tl.debug_barrier()  # all threads have stored before one of them counts the program in
        arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            total = tl.zeros((BM, BN), tl.float32)
            for part in range(SPLIT):
                total += tl.load(parts + part * (BM * BN), cache_modifier=".cg")
            _store(total, residual_ptr, bias_ptr, out_ptr, row, column, M, N, residual_stride, BM, BN)


@triton.jit(do_not_specialize=["M"])
def pointer_kernel(
    hidden_ptr, weight_ptr, residual_ptr, bias_ptr, out_ptr, parts_ptr, counters_ptr,
    M, N, K, hidden_stride, weight_stride, residual_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """``out [M, N]`` of ``hidden [M, K]``, ``weight [N, K]``, ``residual [M, N]`` and ``bias [N]``."""
    row, column, tile = place(M, N, BM, BN, GROUP)
    begin, end = _share(K, BK, SPLIT)
    rows, columns, depth = row + tl.arange(0, BM), column + tl.arange(0, BN), tl.arange(0, BK)
    units = corner(hidden_ptr, row, hidden_stride) + tl.arange(0, BM)[:, None] * hidden_stride + depth[None, :] + begin
    weights = corner(weight_ptr, column, weight_stride) + tl.arange(0, BN)[None, :] * weight_stride + depth[:, None]
    weights += begin
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(begin, end, BK):
        left = depth < end - k
        hidden = tl.load(units, mask=(rows < M)[:, None] & left[None, :], other=0.0)
        weight = tl.load(weights, mask=left[:, None] & (columns < N)[None, :], other=0.0)
        acc = tl.dot(hidden, weight, acc, input_precision="ieee")
        units += BK
        weights += BK
    _finish(
        acc, residual_ptr, bias_ptr, out_ptr, parts_ptr, counters_ptr, row, column, tile, M, N, residual_stride,
        BM, BN, SPLIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def tma_kernel(
    hidden_desc, weight_desc, residual_ptr, bias_ptr, out_ptr, parts_ptr, counters_ptr,
    M, N, K, residual_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The same with ``hidden`` and ``weight`` read through tensor descriptors."""
    row, column, tile = place(M, N, BM, BN, GROUP)
    begin, end = _share(K, BK, SPLIT)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(begin, end, BK):
        acc = tl.dot(hidden_desc.load([row, k]), weight_desc.load([column, k]).T, acc, input_precision="ieee")
    _finish(
        acc, residual_ptr, bias_ptr, out_ptr, parts_ptr, counters_ptr, row, column, tile, M, N, residual_stride,
        BM, BN, SPLIT,
    )  # fmt: skip


def launch(call: Down, config: Config, out: Tensor, counters: Tensor | None = None) -> Launch:
    """How to compute ``out [M, d]`` from a call whose hidden units are ``[M, F]``, with ``M > 0``.

    Args:
        call: rows of hidden units, weight and residual must be contiguous.
        config: the tiles, and by how many the depth is split.
        out: contiguous, of the hidden units' dtype.
        counters: int32 zeros, one a tile, where ``config.split > 1``.
    """
    (M, K), N = call.hidden.shape, call.weight.shape[0]
    tiles = -(-M // config.rows) * -(-N // config.columns)
    parts = None
    if config.split > 1:
        parts = call.hidden.new_empty(tiles, config.split, config.rows, config.columns, dtype=torch.float32)
    shared = {
        "residual_ptr": call.residual,
        "residual_stride": None if call.residual is None else call.residual.stride(0),
        "bias_ptr": call.bias,
        "out_ptr": out,
        "parts_ptr": parts,
        "counters_ptr": counters if config.split > 1 else None,
        "M": M,
        "N": N,
        "K": K,
        "BM": config.rows,
        "BN": config.columns,
        "BK": config.depth,
        "GROUP": GROUP,
        "SPLIT": config.split,
    }
    grid = (tiles, config.split)
    if config.tma:
        own = {
            "hidden_desc": TensorDescriptor.from_tensor(call.hidden, [config.rows, config.depth]),
            "weight_desc": TensorDescriptor.from_tensor(call.weight, [config.columns, config.depth]),
        }
        return Launch(tma_kernel, grid, {**own, **shared}, config.warps, config.stages)
    strides = {"hidden_stride": call.hidden.stride(0), "weight_stride": call.weight.stride(0)}
    pointers = {"hidden_ptr": call.hidden, "weight_ptr": call.weight}
    return Launch(pointer_kernel, grid, {**pointers, **strides, **shared}, config.warps, config.stages)
