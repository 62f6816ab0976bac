"""The ops ``torch.ops.fxfuse.wide_ffn``, ``gate_up_act`` and ``down_add``; their arguments are described in `calls`.

    wide_ffn = residual + down(act(gate(n)) * up(n)) + biases,    n = x * rstd * gain

CPUs compute them in ATen (`aten`), CUDA GPUs in two Triton kernels (`launch`). ``torch.compile`` and ``torch.export``
see opaque ops with shapes and gradients. Backward recomputes gate and up from the arguments, so that a training step
keeps no hidden units. Source: FFN Fusion (arXiv 2503.18908), equation 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fxfuse.kernels import aten, autograd
from fxfuse.kernels.calls import Down, GateUp
from fxfuse.kernels.requirements import require_triton

_LIBRARY = torch.library.Library("fxfuse", "FRAGMENT")  # its ops live as long as this object does
_LIBRARY.define(
    "gate_up_act(Tensor x, Tensor gate_up, Tensor? gate_up_bias=None, Tensor? gain=None, Tensor? rstd=None,"
    " float? eps=None, str activation='silu') -> Tensor"
)
_LIBRARY.define("down_add(Tensor hidden, Tensor down, Tensor? residual=None, Tensor? down_bias=None) -> Tensor")
_LIBRARY.define(
    "wide_ffn(Tensor x, Tensor gate_up, Tensor down, Tensor? residual=None, Tensor? gate_up_bias=None,"
    " Tensor? down_bias=None, Tensor? gain=None, Tensor? rstd=None, float? eps=None, str activation='silu') -> Tensor"
)


class Backend(Protocol):
    """Computes the ops for one kind of device."""

    @property
    def gate_up_act(self) -> Callable[[GateUp], Tensor]: ...

    @property
    def down_add(self) -> Callable[[Down], Tensor]: ...

    @property
    def wide_ffn(self) -> Callable[[GateUp, Tensor, Tensor | None, Tensor | None], Tensor]: ...


class Shapes:
    """The backend that computes nothing: results have their shape and dtype, and no values."""

    def gate_up_act(self, call: GateUp) -> Tensor:
        return call.x.new_empty((*call.x.shape[:-1], call.width))

    def down_add(self, call: Down) -> Tensor:
        return call.hidden.new_empty((*call.hidden.shape[:-1], call.weight.shape[0]))

    def wide_ffn(self, first: GateUp, down: Tensor, residual: Tensor | None, bias: Tensor | None) -> Tensor:
        return self.down_add(Down(self.gate_up_act(first), down, residual, bias))


def _aten(tokens: Tensor) -> Backend:
    return aten


def _triton(tokens: Tensor) -> Backend:
    """For tokens on a GPU. In float64, in which rewrites are verified, ATen computes there too."""
    if tokens.dtype == torch.float64:
        return aten
    require_triton()
    from fxfuse.kernels import launch

    return launch


def _implement(backend: Callable[[Tensor], Backend], register: Callable[[str, Callable[..., Tensor]], object]) -> None:
    """Register what ``backend(tokens)`` computes; asked at each call, so that Triton is imported by the first."""

    def gate_up_act(
        x: Tensor,
        gate_up: Tensor,
        gate_up_bias: Tensor | None = None,
        gain: Tensor | None = None,
        rstd: Tensor | None = None,
        eps: float | None = None,
        activation: str = "silu",
    ) -> Tensor:
        return backend(x).gate_up_act(GateUp(x, gate_up, gate_up_bias, gain, rstd, eps, activation))

    def down_add(
        hidden: Tensor, down: Tensor, residual: Tensor | None = None, down_bias: Tensor | None = None
    ) -> Tensor:
        return backend(hidden).down_add(Down(hidden, down, residual, down_bias))

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
    ) -> Tensor:
        first = GateUp(x, gate_up, gate_up_bias, gain, rstd, eps, activation)
        return backend(x).wide_ffn(first, down, residual, down_bias)

    for function in (gate_up_act, down_add, wide_ffn):
        register(function.__name__, function)


_implement(_aten, lambda name, function: _LIBRARY.impl(name, function, "CPU"))
_implement(_triton, lambda name, function: _LIBRARY.impl(name, function, "CUDA"))
_implement(
    lambda tokens: Shapes(),
    lambda name, function: torch.library.register_fake(f"fxfuse::{name}", function, lib=_LIBRARY),
)

autograd.register(_LIBRARY)
