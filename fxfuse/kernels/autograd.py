"""Gradients of the ops, by recomputation: what is kept are the arguments, and gate and up are computed again.

In ATen on every device. All of backward's five GEMMs are plain ones, with nothing to fuse but passes over hidden units
that inductor fuses, and they come with many tokens, where a vendor's GEMMs are modelled to be the faster (`times`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from fxfuse.kernels import aten
from fxfuse.kernels.calls import Down, GateUp

Gradients = tuple[Tensor | None, ...]


class Context(Protocol):
    """What autograd carries from forward to backward."""

    needs_input_grad: Sequence[bool]
    saved_tensors: Sequence[Tensor | None]
    eps: float | None
    activation: str

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def register(library: torch.library.Library) -> None:
    """Give the ops that ``library`` defines their gradients."""
    for name, backward, setup in (
        ("gate_up_act", _gate_up_act, _keep_activated),
        ("down_add", _down_add, _keep),
        ("wide_ffn", _wide_ffn, _keep_activated),
    ):
        torch.library.register_autograd(f"fxfuse::{name}", backward, setup_context=setup, lib=library)


def _keep(ctx: Context, inputs: Sequence[object], output: Tensor) -> None:
    ctx.save_for_backward(*cast(Sequence[Tensor | None], inputs))


def _keep_activated(ctx: Context, inputs: Sequence[object], output: Tensor) -> None:
    *tensors, eps, activation = inputs
    ctx.save_for_backward(*cast(Sequence[Tensor | None], tensors))
    ctx.eps, ctx.activation = cast(float | None, eps), cast(str, activation)


def _gate_up_act(ctx: Context, grad: Tensor) -> Gradients:
    x, weight, bias, gain, rstd = ctx.saved_tensors
    assert x is not None and weight is not None
    call = GateUp(x, weight, bias, gain, rstd, ctx.eps, ctx.activation)
    own = aten.gate_up_backward(grad, call, aten.project(call), weight=ctx.needs_input_grad[1])
    return own.x, own.weight, own.bias, own.gain, own.rstd, None, None


def _down_add(ctx: Context, grad: Tensor) -> Gradients:
    hidden, weight, residual, bias = ctx.saved_tensors
    assert hidden is not None and weight is not None
    own = aten.down_backward(grad, Down(hidden, weight, None, bias), weight=ctx.needs_input_grad[1])
    return own.hidden, own.weight, None if residual is None else grad, own.bias


def _wide_ffn(ctx: Context, grad: Tensor) -> Gradients:
    x, gate_up, down, residual, gate_up_bias, down_bias, gain, rstd = ctx.saved_tensors
    assert x is not None and gate_up is not None and down is not None
    call = GateUp(x, gate_up, gate_up_bias, gain, rstd, ctx.eps, ctx.activation)
    projected = aten.project(call)
    second = aten.down_backward(grad, Down(projected.hidden, down, None, down_bias), weight=ctx.needs_input_grad[2])
    first = aten.gate_up_backward(second.hidden, call, projected, weight=ctx.needs_input_grad[1])
    to_residual = None if residual is None else grad
    return (
        *(first.x, first.weight, second.weight, to_residual, first.bias, second.bias, first.gain, first.rstd),
        *(None, None),
    )
