"""The graphs that torch.compile sees when a model is called, without compiling anything."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxfuse._torch.apart import APART, own_code
from fxfuse._torch.dynamo import innermost, set_aside
from fxfuse.backend.naming import guard_modules, names_in, specialise
from fxfuse.errors import CaptureError
from fxfuse.graph.surgery import copy_module
from fxfuse.model.force import uncompiled


@dataclass(frozen=True)
class Captured:
    """One graph of a model.

    Attributes:
        gm: the graph; the caller's own to rewrite.
        inputs: what it was called with, weights included, in the order of its placeholders.
        names: the dotted names of its weights, by placeholder.
    """

    gm: fx.GraphModule
    inputs: tuple[Tensor, ...]
    names: dict[fx.Node, str]

    def copy(self) -> Captured:
        """The same with a graph of its own."""
        made = copy_module(self.gm)
        nodes = zip(self.gm.graph.nodes, made.graph.nodes, strict=True)
        return Captured(made, self.inputs, {new: self.names[old] for old, new in nodes if old in self.names})


def take(gm: fx.GraphModule, inputs: Sequence[Tensor], root: nn.Module | None, *, alone: bool = True) -> Captured:
    """Make of a graph that Dynamo hands to its backend one that passes can use: the one way from the one to the other.

    The graph is copied, because Dynamo goes on to read its own after the backend has returned. Its weights get their
    names in ``root``, and the floats that modules hold become numbers.

    Args:
        gm: the graph; it stays as it is.
        inputs: a value for each of its placeholders.
        root: the module that was compiled, if it is known.
        alone: let a graph that Dynamo made of a submodule's frame serve that submodule alone, as a plan needs.
    """
    own = copy_module(gm)
    names = names_in(root, own, inputs)
    if alone:
        guard_modules(own, names)
    specialise(own)
    return Captured(own, tuple(inputs), names)


def compiled_apart(
    model: nn.Module, backend: Callable[[fx.GraphModule, list[Tensor]], Callable[..., object]], dynamic: bool | None
) -> Callable[..., object]:
    """``model`` as ``backend`` compiles it, with no effect on other compilations of the model, nor from them."""
    return _Apart(model, backend, dynamic)


class _Apart:
    """Owns what was compiled. Dynamo keeps backends and what they return for good, so it gets weak references to them.

    Else a model that was looked at once would never be freed.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: Callable[[fx.GraphModule, list[Tensor]], Callable[..., object]],
        dynamic: bool | None,
    ) -> None:
        self._backend = backend
        self._made: list[Callable[..., object]] = []
        owner = weakref.ref(self)

        def lent(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
            own = owner()
            assert own is not None  # it is being called
            made = own._backend(gm, inputs)
            own._made.append(made)
            return _lend(weakref.ref(made))

        def call(*args: object, **kwargs: object) -> object:
            return model(*args, **kwargs)

        self._lent = lent
        # A code object of its own goes away with the function.
        self._compiled: Callable[..., object] = torch.compile(own_code(call), backend=lent, dynamic=dynamic, **APART)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._compiled(*args, **kwargs)

    def set_aside(self) -> None:
        """Let what was compiled so far count towards no limit of the model's other compilations in any torch."""
        if not APART:
            set_aside(self._lent)


def _lend(made: weakref.ref[Callable[..., object]]) -> Callable[..., object]:
    def run(*args: object) -> object:
        own = made()
        assert own is not None  # its owner is being called
        return own(*args)

    return run


def capture(model: nn.Module, *args: object, **kwargs: object) -> tuple[Captured, ...]:
    """Call ``model(*args, **kwargs)`` once, without gradients, and return the graphs that Dynamo makes of it.

    The model itself stays as it is, compiled or not. One graph is the rule; graph breaks give several.

    Raises:
        CaptureError: the call fails, or nothing in it could be traced.
    """
    found: list[Captured] = []

    def keep(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        found.append(take(gm, inputs, model))
        return gm.forward

    compiled = _Apart(model, keep, dynamic=False)
    with torch.no_grad(), uncompiled(model):
        try:
            compiled(*args, **kwargs)
        except Exception as error:
            reason = innermost(error)
            first = next((line.strip() for line in str(reason).splitlines() if line.strip()), "")
            raise CaptureError(f"the model could not be called and traced: {type(reason).__name__}: {first}") from error
        finally:
            compiled.set_aside()
    if not found:
        raise CaptureError(
            "calling the model gave no graph: torch.compile is disabled (TORCH_COMPILE_DISABLE, or "
            "torch.compiler.disable on its forward), or the call computes nothing"
        )
    return tuple(found)
