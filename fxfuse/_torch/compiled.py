"""Compiled modules: what torch.compile left in a module, or made of it. Seen on torch 2.13.0.

torch.compile gives no public way back: neither to the module, nor to the arguments that it was called with, nor to call
the module uncompiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

COMPILED_CALL = "_compiled_call_impl"
"""The attribute of a module that ``module.compile()`` sets, and that its call runs if it is not None."""


def original(model: nn.Module) -> nn.Module:
    """The module itself where ``model`` is what torch.compile returned for it."""
    while isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    return model


def compiled_call(model: nn.Module) -> Callable[..., object] | None:
    """What a call of a module that was compiled in place runs."""
    call: Callable[..., object] | None = getattr(model, COMPILED_CALL, None)
    return call


def set_compiled_call(model: nn.Module, call: Callable[..., object] | None) -> None:
    """Let calls of the module run ``call``, as if it was compiled in place."""
    model._compiled_call_impl = call


def uncompiled_call(model: nn.Module) -> Callable[..., object]:
    """What a call of the module runs if it is not compiled: its hooks and its forward."""
    call: Callable[..., object] = model._call_impl
    return call


def called(model: nn.Module) -> str:
    """The attribute that holds what a call of a compiled module runs."""
    return "forward" if isinstance(model, torch._dynamo.OptimizedModule) else COMPILED_CALL


def compile_again(compiled: nn.Module, **arguments: Any) -> None:
    """Compile with other arguments; graphs that were made with the former ones serve no longer."""
    if not isinstance(compiled, torch._dynamo.OptimizedModule):
        compiled.compile(**arguments)
        return
    fresh: object = torch.compile(original(compiled), **arguments)
    assert isinstance(fresh, torch._dynamo.OptimizedModule)
    compiled.dynamo_ctx = fresh.dynamo_ctx
    compiled._initialize()


def arguments_of(compiled: nn.Module) -> dict[str, Any] | None:
    """The arguments that torch.compile was called with, the backend's function among them; None if it was not called.

    Only the backend's own are in one place.
    """
    if isinstance(compiled, torch._dynamo.OptimizedModule):
        context: object = compiled.dynamo_ctx
    else:
        call = compiled_call(compiled)
        context = None if call is None else inspect.getclosurevars(call).nonlocals.get("self")
    limit, backend = None, getattr(context, "callback", None)
    while inner := getattr(backend, "_torchdynamo_orig_backend", None):
        limit, backend = getattr(backend, "_recompile_limit", limit), inner
    if not isinstance(backend, torch._TorchCompileWrapper):
        return None
    found = {
        "recompile_limit": limit,
        "dynamic": backend.dynamic,
        "fullgraph": getattr(context, "fullgraph", False),
        "isolate_recompiles": getattr(context, "_isolate_recompiles_id", -1) != -1 or None,  # not in every torch
        "shapes_spec": getattr(context, "_shapes_spec", None),
    }
    options = dict(backend.kwargs.get("options") or {})
    guards = getattr(getattr(context, "_hooks", None), "guard_filter_fn", None)
    if guards is not None:
        options["guard_filter_fn"] = guards
    given = {name: value for name, value in found.items() if value is not None}
    return {**backend.kwargs, **given, "options": options, "backend": backend.compiler_fn}
