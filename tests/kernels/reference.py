"""What the kernels compute, as naively as it can be written: one FFN, ``y = residual + down(act(gate(n)) * up(n))``.

``n`` is the RMS norm of ``x``, or ``x`` itself. Everything is computed in the dtype of ``precision`` and nothing is
rounded in between; no code is shared with the implementations. Source: SwiGLU is GLU Variants (arXiv 2002.05202), the
wide FFN is FFN Fusion (arXiv 2503.18908), equation 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda v: v / (1 + torch.exp(-v)),
    "gelu": lambda v: v * (1 + torch.erf(v / math.sqrt(2))) / 2,
    "gelu_tanh": lambda v: v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
    "relu": lambda v: torch.where(v > 0, v, 0 * v),
    "relu2": lambda v: torch.where(v > 0, v * v, 0 * v),
    "sigmoid": lambda v: 1 / (1 + torch.exp(-v)),
}
"""Activations by name. The name ``gelu`` is the exact one, ``relu2`` the square of ReLU."""


def gate_up_act(
    x: Tensor,
    gate_up: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    rstd: Tensor | None = None,
    eps: float | None = None,
    activation: str = "silu",
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """The hidden units ``[..., F]`` of tokens ``x [..., d]``, in ``precision``.

    Args:
        x: tokens.
        gate_up: ``[2, F, d]``, gate and up; or ``[1, F, d]``, a plain MLP without a gate.
        bias: ``[2, F]`` or ``[1, F]``.
        gain: ``[d]``, of a norm that is not folded into the weights.
        rstd: ``[...]``, one factor for each token.
        eps: instead of ``rstd``: the factor is ``1 / sqrt(mean(x^2) + eps)``.
        activation: a name in `ACTIVATIONS`.
        precision: float64, or float32.
    """
    normed = x.to(precision)
    if eps is not None:
        normed = normed / torch.sqrt((normed * normed).mean(-1, keepdim=True) + eps)
    elif rstd is not None:
        normed = normed * rstd.to(precision).unsqueeze(-1)
    if gain is not None:
        normed = normed * gain.to(precision)
    products = [normed @ weight.T for weight in gate_up.to(precision)]
    if bias is not None:
        products = [product + row for product, row in zip(products, bias.to(precision), strict=True)]
    hidden = ACTIVATIONS[activation](products[0])
    return hidden * products[1] if len(products) == 2 else hidden


def down_add(
    hidden: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """``residual + hidden down^T + bias``, ``[..., d]``, in ``precision``; ``down`` is ``[d, F]``."""
    y = hidden.to(precision) @ down.to(precision).T
    for term in (bias, residual):
        if term is not None:
            y = y + term.to(precision)
    return y


def wide_ffn(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gain: Tensor | None = None,
    rstd: Tensor | None = None,
    eps: float | None = None,
    activation: str = "silu",
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """A whole FFN: `gate_up_act`, then `down_add`. ``[..., d]``, in ``precision``."""
    hidden = gate_up_act(x, gate_up, gate_up_bias, gain, rstd, eps, activation, precision)
    return down_add(hidden, down, residual, down_bias, precision)
