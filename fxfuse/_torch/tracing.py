"""What Dynamo is compiling at this moment, as told by its stack. Seen on torch 2.13.0.

A backend gets a graph and its inputs, and no public API tells what they are a part of.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.symbolic_convert import InstructionTranslator


def compiled_module() -> nn.Module | None:
    """The module whose compiled call is running: the innermost one on the stack; None under ``torch.compile(fn)``."""
    for frame in _stack():
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch._dynamo.OptimizedModule):
            module: nn.Module = owner._orig_mod
            return module
        if isinstance(owner, nn.Module) and getattr(owner, "_compiled_call_impl", None) is not None:
            return owner
    return None


def _stack() -> Iterator[FrameType]:
    """The frames of torch's own code, the innermost first.

    Before Python 3.13, to look at the locals of a frame keeps them alive as long as it runs: no user's is looked at.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith("torch."):
            yield frame
        frame = frame.f_back


def uncut_inputs() -> dict[str, object] | None:
    """The inputs, by name, of the graph that DDP has cut where its buckets end; None if no such graph is compiled.

    Its parts have the same names for the same inputs, and fake tensors in their places.
    """
    for frame in _stack():
        if frame.f_code.co_name == "compile_fn" and isinstance(frame.f_locals.get("self"), DDPOptimizer):
            gm, inputs = frame.f_locals["gm"], frame.f_locals["example_inputs"]
            return {node.name: each for node, each in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)}
    return None


def is_broken() -> bool | None:
    """Whether a graph break begins or ends the graph that is compiled; None if Dynamo traces nothing now."""
    try:
        tx = InstructionTranslator.current_tx()
    except AttributeError:
        return None
    reason = tx.output.compile_subgraph_reason
    resumed = tx.f_code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)
    return bool(resumed or (reason is not None and reason.graph_break))


def traced_with() -> object:
    """The backend for which Dynamo traces."""
    return InstructionTranslator.current_tx().output.compiler_fn


@dataclass(frozen=True)
class ChosenBackend:
    """The function that compiles, and the options that torch.compile hands on to it."""

    function: Callable[..., object]
    options: Mapping[str, Any]  # as the user gave them


def chosen_backend(callback: object) -> ChosenBackend | None:
    """The backend inside what Dynamo calls.

    Dynamo wraps it, and so does DDP, which cuts graphs where its buckets end. None if torch.compile made none of it.
    """
    while inner := _inner(callback):
        callback = inner
    if not isinstance(callback, torch._TorchCompileWrapper):
        return None
    return ChosenBackend(callback.compiler_fn, callback.kwargs.get("options") or {})


def _inner(callback: object) -> object:
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, DDPOptimizer):
        return owner.backend_compile_fn
    return getattr(callback, "_torchdynamo_orig_backend", None)


def update_options(change: Mapping[str, object]) -> None:
    """Let torch.compile's wrapper, which has called the caller of this function's caller, hold other options.

    It compares its options with those of earlier calls to decide whether their graphs serve it too: as a user may
    change a dict of options, it gets one of its own.
    """
    wrapper = sys._getframe(3).f_locals.get("self")
    if isinstance(wrapper, torch._TorchCompileWrapper) and "options" in wrapper.kwargs:
        wrapper.kwargs = {**wrapper.kwargs, "options": {**wrapper.kwargs["options"], **change}}
