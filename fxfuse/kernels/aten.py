"""What the ops compute, in ATen: the implementation for CPUs, and the gradients for every device.

A GEMM of ATen rounds its result to the model's dtype, so tokens are normalised first: un-normalised products come close
to the largest float16. Statistics and row scales are float32 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.kernels.calls import Down, GateUp

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """``forward(v)``, and ``backward(grad, v)``: the gradient to v, where that to ``forward(v)`` is ``grad``."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _sigmoid_backward(grad: Tensor, v: Tensor) -> Tensor:
    value = torch.sigmoid(v)
    return grad * value * (1 - value)


_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation(F.silu, _aten.silu_backward),
    "gelu": Activation(F.gelu, _aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda v: F.gelu(v, approximate="tanh"), lambda grad, v: _aten.gelu_backward(grad, v, approximate="tanh")
    ),
    "relu": Activation(F.relu, lambda grad, v: torch.where(v > 0, grad, 0)),
    "relu2": Activation(lambda v: F.relu(v).square(), lambda grad, v: grad * 2 * F.relu(v)),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_backward),
}


@dataclass(frozen=True)
class Projected:
    """The first half of an FFN before its activation: what backward recomputes."""

    tokens: Tensor
    """``x * rstd * gain``, in the dtype of x."""
    rstd: Tensor | None
    """``[..., 1]``, float32 at least; None if there is no norm."""
    products: tuple[Tensor, ...]
    """Gate and up, ``[..., F]`` each; or the one projection of a plain MLP."""
    activation: Activation

    @property
    def hidden(self) -> Tensor:
        """The hidden units, ``[..., F]``."""
        hidden = self.activation.forward(self.products[0])
        return hidden * self.products[1] if len(self.products) == 2 else hidden


@dataclass(frozen=True)
class GateUpGradients:
    """Gradients of `GateUp`'s tensors; None where there is no such tensor, or where it was not asked for."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    gain: Tensor | None
    rstd: Tensor | None


@dataclass(frozen=True)
class DownGradients:
    """Gradients of `Down`'s tensors; that of the residual is the one of the result."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None


def gate_up_act(call: GateUp) -> Tensor:
    """Hidden units, ``[..., F]``."""
    return project(call).hidden


def down_add(call: Down) -> Tensor:
    """``residual + hidden weight^T + bias``, ``[..., d]``."""
    y = F.linear(call.hidden, call.weight, call.bias)
    return y if call.residual is None else y + call.residual


def wide_ffn(first: GateUp, down: Tensor, residual: Tensor | None, bias: Tensor | None) -> Tensor:
    """Both halves, ``[..., d]``."""
    return down_add(Down(gate_up_act(first), down, residual, bias))


def project(call: GateUp) -> Projected:
    """Normalise, rounding once, then gate and up as one GEMM."""
    x, gain = _wide(call.x), call.gain
    rstd = None if call.rstd is None else call.rstd.unsqueeze(-1)
    if call.eps is not None:
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + call.eps)
    normed = x if rstd is None else x * rstd
    tokens = (normed if gain is None else normed * _wide(gain)).to(call.x.dtype)
    bias = None if call.bias is None else call.bias.flatten()
    products = torch.split(F.linear(tokens, call.weight.flatten(0, 1), bias), call.width, -1)
    return Projected(tokens, rstd, products, _ACTIVATIONS[call.activation])


def gate_up_backward(grad: Tensor, call: GateUp, projected: Projected, weight: bool) -> GateUpGradients:
    """From ``grad``, the gradient to the hidden units ``[..., F]``.

    Args:
        grad: ``[..., F]``.
        call: what the op was called with.
        projected: ``project(call)``.
        weight: whether that of the weight is wanted: it is as much work as the op itself.
    """
    act, products = projected.activation, projected.products
    if len(products) == 2:
        gate, up = products
        grad = torch.cat([act.backward(grad * up, gate), grad * act.forward(gate)], -1)
    else:
        grad = act.backward(grad, products[0])
    flat = grad.flatten(0, -2)
    to_weight = (flat.T @ projected.tokens.flatten(0, -2)).view_as(call.weight) if weight else None
    to_bias = None if call.bias is None else flat.sum(0).view_as(call.bias)

    x, to_scaled = _wide(call.x), _wide(grad @ call.weight.flatten(0, 1))
    rstd = projected.rstd
    normed = x if rstd is None else x * rstd
    to_gain = None if call.gain is None else (to_scaled * normed).flatten(0, -2).sum(0).to(call.gain.dtype)
    to_normed = to_scaled if call.gain is None else to_scaled * _wide(call.gain)
    if rstd is None:
        return GateUpGradients(to_normed.to(call.x.dtype), to_weight, to_bias, to_gain, None)
    if call.eps is not None:  # rstd depends on x too
        to_normed = to_normed - normed * (to_normed * normed).mean(-1, keepdim=True)
    to_rstd = None if call.rstd is None else (to_normed * x).sum(-1)
    return GateUpGradients((to_normed * rstd).to(call.x.dtype), to_weight, to_bias, to_gain, to_rstd)


def down_backward(grad: Tensor, call: Down, weight: bool) -> DownGradients:
    """From ``grad``, the gradient to the result ``[..., d]``; ``weight`` says whether that of the weight is wanted."""
    flat = grad.flatten(0, -2)
    to_weight = flat.T @ call.hidden.flatten(0, -2) if weight else None
    return DownGradients(grad @ call.weight, to_weight, None if call.bias is None else flat.sum(0))


def _wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
