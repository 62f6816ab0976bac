"""The insides of ``nn.Module``: hooks that were registered, and the dicts of parts. Seen on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

from torch import nn

PARTS = "_modules"
"""The attribute that holds a module's own parts by name."""


def pre_hooks(module: nn.Module) -> MutableMapping[int, Callable[..., object]]:
    """The forward pre-hooks, to look at or take out: the public API only adds, and removes by handles."""
    return module._forward_pre_hooks


def put_first(module: nn.Module, hook: Callable[..., object]) -> None:
    """Register a forward pre-hook that runs before all others, in a dict that Dynamo can count in.

    The public ``prepend=True`` moves the hook within an OrderedDict alone. Dynamo's guards name a hook by its place in
    ``dict.keys``, which tells the order of insertion: torch 2.11.0 compares it with the wrong hook and dies, 2.13.0
    does not. So the dict is filled anew, in the order in which it runs.
    """
    module.register_forward_pre_hook(hook, prepend=True)
    hooks = pre_hooks(module)
    in_order = list(hooks.items())
    hooks.clear()
    hooks.update(in_order)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs any hook; nothing public tells."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def holds_weights(module: nn.Module) -> bool:
    """Whether the module has parameters of its own, be they None, which the public iterators pass over."""
    return bool(module._parameters)


def parts(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dict itself of a module's own parts; the public iterators pass over names that hold None."""
    return module._modules


def set_parts(module: nn.Module, made: dict[str, nn.Module | None]) -> None:
    """Let a module keep its parts in another dict: of a type that Dynamo's guards tell from a plain one."""
    vars(module)[PARTS] = made
