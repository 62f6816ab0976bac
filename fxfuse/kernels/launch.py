"""The ops on a GPU: which kernels are launched for a call, with which tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxfuse.errors import KernelError
from fxfuse.hardware import gpus
from fxfuse.hardware.configs import COUNTERS, LOOP_ROWS, Gemm
from fxfuse.hardware.gpus import Gpu
from fxfuse.kernels import down, gate_up, rstd, tune
from fxfuse.kernels.calls import Down, GateUp, changed
from fxfuse.kernels.launches import Launch

FAR = 2**23
"""Elements between two rows, at most: offsets inside a tile of up to 256 rows are int32."""


@dataclass(frozen=True)
class Work:
    """Launches, in the order in which they are to be made, and the matrix that they fill in the end."""

    launches: tuple[Launch, ...]
    out: Tensor


def gate_up_act(call: GateUp) -> Tensor:
    """``fxfuse::gate_up_act`` on the GPU where the tokens are, ``[..., F]``."""
    return _run(gate_up_work(call, gpus.of_device(call.x.device)), call.x)


def down_add(call: Down) -> Tensor:
    """``fxfuse::down_add`` on the GPU where the hidden units are, ``[..., d]``."""
    return _run(down_work(call, gpus.of_device(call.hidden.device)), call.hidden)


def wide_ffn(first: GateUp, down: Tensor, residual: Tensor | None, bias: Tensor | None) -> Tensor:
    """``fxfuse::wide_ffn`` on the GPU where the tokens are, ``[..., d]``."""
    return _run(wide_work(first, down, residual, bias, gpus.of_device(first.x.device)), first.x)


def gate_up_work(call: GateUp, gpu: Gpu, counters: Tensor | None = None) -> Work:
    """What computes the hidden units ``[M, F]``: one kernel, or two where many tokens are to be normalised.

    Args:
        call: tokens of any shape.
        gpu: for which to choose the tiles.
        counters: int32 ``[COUNTERS]``, to be zeroed along the way.

    Raises:
        KernelError: the weight is not contiguous, or the GPU or the dtype is not supported.
    """
    _check_rows("gate_up", call.weight)
    x = _matrix(call.x)
    call = changed(call, x=x, bias=_dense(call.bias), gain=_dense(call.gain), rstd=_dense(call.rstd, flat=True))
    out = x.new_empty(x.shape[0], call.width)
    if not out.numel():
        return Work((), out)
    aligned = _aligned(x, call.weight, out)
    gemm = Gemm("gate_up", out.shape[0], out.shape[1], x.shape[1], x.dtype, aligned)
    config = tune.chosen(gemm, gpu)
    before: tuple[Launch, ...] = ()
    if call.eps is not None and config.rows > LOOP_ROWS:
        factors = x.new_empty(x.shape[0], dtype=torch.float32)
        before = (rstd.launch(x, call.eps, factors),)
        call = changed(call, eps=None, rstd=factors)
    return Work((*before, gate_up.launch(call, config, out, counters)), out)


def down_work(call: Down, gpu: Gpu, counters: Tensor | None = None) -> Work:
    """What computes ``[M, d]``: one kernel.

    Args:
        call: hidden units of any shape.
        gpu: for which to choose the tiles.
        counters: int32 ``[COUNTERS]``, zero by the time the kernel runs; None to have them made.

    Raises:
        KernelError: the weight is not contiguous, or the GPU or the dtype is not supported.
    """
    _check_rows("down", call.weight)
    hidden = _matrix(call.hidden)
    residual = None if call.residual is None else _matrix(call.residual)
    call = changed(call, hidden=hidden, residual=residual, bias=_dense(call.bias))
    out = hidden.new_empty(hidden.shape[0], call.weight.shape[0])
    if not out.numel():
        return Work((), out)
    aligned = _aligned(hidden, call.weight, out, residual)
    gemm = Gemm("down", out.shape[0], out.shape[1], hidden.shape[1], hidden.dtype, aligned)
    config = tune.chosen(gemm, gpu)
    if config.split > 1 and counters is None:
        counters = hidden.new_zeros(COUNTERS, dtype=torch.int32)
    return Work((down.launch(call, config, out, counters),), out)


def wide_work(first: GateUp, down: Tensor, residual: Tensor | None, bias: Tensor | None, gpu: Gpu) -> Work:
    """What computes a whole FFN, ``[M, d]``: two kernels, or three where many tokens are to be normalised."""
    counters = first.x.new_empty(COUNTERS, dtype=torch.int32)
    one = gate_up_work(first, gpu, counters)
    matrix = None if residual is None else residual.reshape(-1, residual.shape[-1])
    two = down_work(Down(one.out, down, matrix, bias), gpu, counters)
    return Work((*one.launches, *two.launches), two.out)


def _run(work: Work, like: Tensor) -> Tensor:
    with torch.cuda.device(like.device):  # Triton launches where the thread is, not where the tensors are
        for launch in work.launches:
            launch.run()
    return work.out.view(*like.shape[:-1], work.out.shape[-1])


def _matrix(tensor: Tensor) -> Tensor:
    """Tokens as rows, each contiguous and apart from the others; a copy only where the strides leave no other way.

    Rows that share memory, as of an expanded tensor, are copied too: a tensor descriptor takes no stride of zero.
    """
    matrix = tensor.reshape(-1, tensor.shape[-1])
    if matrix.shape[0] == 1:
        return matrix[0].contiguous().unsqueeze(0)  # what the stride of a single row is, nobody says
    dense = matrix.stride(1) == 1 or matrix.shape[1] == 1
    return matrix if dense and matrix.shape[1] <= matrix.stride(0) <= FAR else matrix.contiguous()


def _dense(tensor: Tensor | None, flat: bool = False) -> Tensor | None:
    return None if tensor is None else tensor.flatten().contiguous() if flat else tensor.contiguous()


def _check_rows(name: str, weight: Tensor) -> None:
    if weight.stride(-1) != 1 and weight.shape[-1] != 1:
        raise KernelError(f"the rows of {name} must be contiguous: pack it so once, or every call would copy it")
    if weight.shape[-2] > 1 and not weight.shape[-1] <= weight.stride(-2) <= FAR:
        raise KernelError(f"the rows of {name} must be apart by at least their length, and by {FAR} elements at most")


def _aligned(*tensors: Tensor | None) -> bool:
    """Whether Triton will know that sizes, strides and addresses are divisible by 16."""
    given = [tensor for tensor in tensors if tensor is not None]
    numbers = (number for tensor in given for number in (tensor.shape[-1], *tensor.stride()[:-1]))
    return all(number % 16 == 0 for number in numbers) and all(tensor.data_ptr() % 16 == 0 for tensor in given)
