"""Names of weights as the user's model has them.

Dynamo tells where a graph's inputs come from, seen from the frame it compiled: after a graph break inside a layer that
is the layer, and ``mlp`` is all it says. The module that was compiled is on the Python stack while a backend runs, and
its parameters are the very objects that the graph gets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx, nn
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import NNModuleSource

from fxfuse.graph import values
from fxfuse.graph.values import clean, module_path
from fxfuse.prune import is_dropped


def compiled_root() -> nn.Module | None:
    """The module whose compiled call is running: the innermost one on the stack; None under ``torch.compile(fn)``."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch._dynamo.OptimizedModule):
            return owner._orig_mod
        if isinstance(owner, nn.Module) and getattr(owner, "_compiled_call_impl", None) is not None:
            return owner
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def names_in(root: nn.Module | None, gm: fx.GraphModule, inputs: Sequence[object]) -> dict[fx.Node, str]:
    """The dotted names, from ``root``, of those inputs of the graph that are its parameters or buffers; or none."""
    return {} if root is None else values.names_in(root, gm, inputs)


def guard_modules(gm: fx.GraphModule, names: Mapping[fx.Node, str]) -> None:
    """Let a graph that Dynamo made of a submodule's own frame serve that submodule alone.

    After a graph break inside a layer Dynamo compiles the layer's forward, and the one graph would serve all layers:
    their weights are its inputs. A plan tells layers apart.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None:
        return
    inner = [node for node, name in names.items() if clean(name).endswith(f".{module_path(node)}")]
    for owner in {_owner(node) for node in inner}:
        if owner is not None:
            context.guards_context.dynamo_guards.add(owner.make_guard(GuardBuilder.ID_MATCH))


def specialise(gm: fx.GraphModule) -> None:
    """Make numbers of those floats that modules hold (an eps, a multiplier) and ``dynamic=True`` made symbols of.

    As symbols they differ from layer to layer for all a compiler can tell, and no two norms are alike. Each gets a
    guard, so that a graph is made anew should one of them change; floats that are arguments of the call stay symbols.
    """
    for node in list(gm.graph.nodes):
        symbol = node.meta.get("example_value")
        if not isinstance(symbol, torch.SymFloat) or node.op == "placeholder":
            continue
        if any(source.op != "placeholder" or _owner(source) is None for source in node.all_input_nodes):
            continue
        numbers = {node: float(symbol)}  # this is what adds the guard
        for user in list(node.users):
            user.args = fx.map_arg(user.args, _replacing(numbers))
            user.kwargs = fx.map_arg(user.kwargs, _replacing(numbers))
        gm.graph.erase_node(node)


def _replacing(numbers: Mapping[fx.Node, float]) -> Callable[[fx.Node], fx.node.Argument]:
    return lambda node: numbers.get(node, node)


def _owner(node: fx.Node) -> torch._guards.Source | None:
    """The outermost module that an input's source goes through: the module whose frame it is."""
    owner, source = None, getattr(node, "_dynamo_source", None)
    while source is not None:
        owner = source.base if isinstance(source, NNModuleSource) else owner
        source = getattr(source, "base", None)
    return owner


def elsewhere(root: nn.Module | None, names: Mapping[fx.Node, str]) -> Callable[[str], bool]:
    """Whether a branch's name stands for a module that this graph does not hold: another does, or it was pruned."""
    if root is None:
        return lambda name: False
    modules = {clean(path): module for path, module in root.named_modules(remove_duplicate=False)}
    here = {clean(name) for name in names.values()}

    def test(name: str) -> bool:
        module = modules.get(name)
        if module is None:
            return False
        if is_dropped(module):
            return True
        held = [clean(f"{name}.{own}") for own, _ in module.named_parameters()]
        return bool(held) and not any(path in here for path in held)

    return test
