"""Compilations apart: they neither serve a model's other compilations, nor count towards the limit of these.

Dynamo keeps what it compiled with the code of a function, and all models of a class share that of its ``forward``.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxfuse._torch.compiled import COMPILED_CALL

APART: Any = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
"""For torch.compile, where it knows such a thing."""


def own_code(function: Callable[..., object]) -> Callable[..., object]:
    """A copy of a Python function with a code object of its own: Dynamo keeps what it compiled with that."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)


def twin(model: nn.Module) -> nn.Module:
    """A second handle of ``model``: the same submodules and weights, not compiled, and compiled by itself.

    Dynamo keeps its graphs with the code of the function that it compiled, here one of the handle's own.
    """
    made: nn.Module = object.__new__(type(model))
    vars(made).update(vars(model) | {COMPILED_CALL: None})
    forward = made.forward

    def call(self: nn.Module, *args: object, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    fresh = types.FunctionType(call.__code__.replace(), dict(call.__globals__), "forward", None, call.__closure__)
    vars(made)["forward"] = types.MethodType(fresh, made)
    return made


def forget(handle: nn.Module) -> None:
    """Let go of all that was compiled for a :func:`twin`: Dynamo holds it in the globals of the handle's function."""
    method = vars(handle)["forward"]
    assert isinstance(method, types.MethodType)
    names = method.__func__.__globals__
    names.update(dict.fromkeys(names))  # the names stay: Dynamo deletes its own when it comes to it
