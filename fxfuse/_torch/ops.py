"""Ops as graphs hold them: overloads, their schemas, and the functions that Dynamo traces to private names.

Seen on torch 2.11.0 and 2.13.0. ``torch.ops.aten.add.Tensor`` is public, and its class, its schema are not.
"""

from __future__ import annotations

from torch._C import FunctionSchema, _nn
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket

nn_functions = _nn
"""Activations that Dynamo traces ``torch.nn.functional`` to, under names that are not public."""

BARRIERS = (
    "_enter_autocast",
    "_exit_autocast",
    "_set_grad_enabled",
    "_enter_inference_mode",
    "_exit_inference_mode",
    "_vmap_increment_nesting",
    "_vmap_decrement_nesting",
)
"""Functions that change what the ops after them mean."""

CHECKPOINT_CONTEXT = "_checkpoint_context_fn"
"""The key of ``meta`` under which Dynamo keeps what a region that is checkpointed saves, if the model says it."""

REGIONS = frozenset({("_vmap_increment_nesting", "_vmap_decrement_nesting"), ("_enter_autocast", "_exit_autocast")})
"""Those of them that open and close a region."""


def schema(overload: OpOverload) -> FunctionSchema:
    """The parameters and results of an overload, with what it writes and what shares memory."""
    return overload._schema


def overloads_of(packet: OpOverloadPacket) -> list[OpOverload]:
    """All overloads of an op; the public method gives their names alone."""
    names: list[str] = packet.overloads()  # type: ignore[no-untyped-call]  # torch does not annotate it
    return [getattr(packet, name) for name in names]


def overload_name(overload: OpOverload) -> str:
    """``Tensor`` of ``aten::add.Tensor``."""
    return overload._overloadname


def op_name(overload: OpOverload) -> str:
    """``add`` of ``aten::add.Tensor``."""
    return overload._opname
