"""What an op is called with: the arguments of the two halves of an FFN, checked.

| argument | shape | |
|---|---|---|
| ``x`` | ``[..., d]`` | tokens; not normalised yet if there is ``rstd`` or ``eps`` |
| ``gate_up`` | ``[2, F, d]`` | gate and up of all FFNs, see `pack`; ``[1, F, d]``: a plain MLP, without a gate |
| ``gate_up_bias`` | ``[2, F]`` or ``[1, F]`` | |
| ``gain`` | ``[d]`` | of the norm, unless folded into ``gate_up``, which rounds once less and cannot overflow float16 |
| ``rstd`` | ``[...]`` | one factor a token, of an RMS norm computed elsewhere; float32, or float64 for float64 tokens |
| ``eps`` | | instead of ``rstd``: the op is the RMS norm itself, ``rstd = 1 / sqrt(mean(x^2) + eps)`` |
| ``activation`` | | silu, gelu (exact), gelu_tanh, relu, relu2 or sigmoid |
| ``down`` | ``[d, F]`` | |
| ``down_bias`` | ``[d]`` | |
| ``residual`` | ``[..., d]`` | what the FFN's contribution is added to |

All tensors but ``rstd`` have one dtype: float32, float16 or bfloat16; also float64, in ATen. All are on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fxfuse.errors import KernelError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid")
"""Activations by name: ``gelu`` is the exact one, ``relu2`` the square of ReLU."""


@dataclass(frozen=True)
class GateUp:
    """The first half: ``act(gate(n)) * up(n)`` with ``n = x * rstd * gain``.

    Raises:
        KernelError: the arguments do not fit each other; the message names the one at fault.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    gain: Tensor | None = None
    rstd: Tensor | None = None
    eps: float | None = None
    activation: str = "silu"

    def __post_init__(self) -> None:
        x, weight = self.x, self.weight
        if x.dim() < 2 or weight.dim() != 3 or weight.shape[0] not in (1, 2) or weight.shape[2] != x.shape[-1]:
            raise KernelError(
                "x must be [..., d] and gate_up [2, F, d], or [1, F, d] for a plain MLP;"
                f" they are {list(x.shape)} and {list(weight.shape)}"
            )
        _check_shape("gate_up_bias", self.bias, weight.shape[:2])
        _check_shape("gain", self.gain, x.shape[-1:])
        _check_shape("rstd", self.rstd, x.shape[:-1])
        _check_dtypes(x, weight, self.bias, self.gain)
        _check_devices(x, weight, self.bias, self.gain, self.rstd)
        if self.rstd is not None:
            if self.eps is not None:
                raise KernelError("give rstd, or eps to have it computed; not both")
            wanted = torch.promote_types(x.dtype, torch.float32)
            if self.rstd.dtype != wanted:
                raise KernelError(f"rstd must be {wanted}, not {self.rstd.dtype}")
        if self.activation not in ACTIVATIONS:
            raise KernelError(f"activation must be one of {', '.join(ACTIVATIONS)}; not {self.activation!r}")

    @property
    def gated(self) -> bool:
        """Whether there is a gate and an up, or one projection only."""
        return self.weight.shape[0] == 2

    @property
    def width(self) -> int:
        """Hidden units, F."""
        return self.weight.shape[1]


@dataclass(frozen=True)
class Down:
    """The second half: ``residual + hidden weight^T + bias``.

    Raises:
        KernelError: the arguments do not fit each other; the message names the one at fault.
    """

    hidden: Tensor
    weight: Tensor
    residual: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        hidden, weight = self.hidden, self.weight
        if hidden.dim() < 2 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
            raise KernelError(
                f"down must be [d, F] for hidden units [..., F]; they are {list(weight.shape)} and {list(hidden.shape)}"
            )
        _check_shape("residual", self.residual, (*hidden.shape[:-1], weight.shape[0]))
        _check_shape("down_bias", self.bias, weight.shape[:1])
        _check_dtypes(hidden, weight, self.residual, self.bias)
        _check_devices(hidden, weight, self.residual, self.bias)


Call = TypeVar("Call", GateUp, Down)


def changed(call: Call, **fields: Tensor | float | None) -> Call:
    """The call with other arguments that are as good: nothing is checked again, which is most of a call's time."""
    copy = object.__new__(type(call))
    vars(copy).update(vars(call), **fields)
    return copy


def _check_shape(name: str, tensor: Tensor | None, wanted: Sequence[int]) -> None:
    if tensor is not None and tensor.shape != tuple(wanted):
        raise KernelError(f"{name} must be {list(wanted)}, not {list(tensor.shape)}")


def _check_dtypes(first: Tensor, *others: Tensor | None) -> None:
    wanted = first.dtype
    if not wanted.is_floating_point or any(tensor is not None and tensor.dtype != wanted for tensor in others):
        dtypes = {wanted, *(tensor.dtype for tensor in others if tensor is not None)}
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise KernelError(f"tokens, weights, biases and gain must have one floating-point dtype; these have {names}")


def _check_devices(*tensors: Tensor | None) -> None:
    """A kernel on one GPU would read the addresses of another's tensors as if they were its own."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise KernelError(f"all tensors must be on one device; these are on {', '.join(sorted(map(str, devices)))}")
