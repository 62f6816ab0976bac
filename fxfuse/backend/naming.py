"""Names of weights as the user's model has them.

Dynamo tells where a graph's inputs come from, seen from the frame it compiled: after a graph break inside a layer that
is the layer, and ``mlp`` is all it says. The module that was compiled is on the Python stack while a backend runs, and
its parameters are the very objects that the graph gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx, nn

from fxfuse._torch.sources import guard_identity, is_guarded, outermost_module
from fxfuse._torch.tracing import compiled_module, is_broken, uncut_inputs
from fxfuse.graph import values
from fxfuse.graph.values import clean, module_path, unwrapped
from fxfuse.model.stand_ins import is_dropped
from fxfuse.passes.pipeline import CUT, Cut
from fxfuse.plan import Member, Plan


def compiled_root() -> nn.Module | None:
    """The module whose compiled call is running: the innermost one on the stack; None under ``torch.compile(fn)``.

    Of one that DDP wraps, the one that it wraps.
    """
    module = compiled_module()
    return None if module is None else unwrapped(module)


def names_in(root: nn.Module | None, gm: fx.GraphModule, inputs: Sequence[object]) -> dict[fx.Node, str]:
    """The dotted names, from ``root``, of those inputs of the graph that are its parameters or buffers; or none."""
    if root is None:
        return {}
    whole = uncut_inputs()
    if whole is None:
        return values.names_in(root, gm, inputs)
    given = [whole.get(node.name) for node in gm.graph.find_nodes(op="placeholder")]
    return values.names_in(root, gm, given)


def for_root(plan: Plan, root: nn.Module | None) -> Plan:
    """``plan`` with the names that its branches have in ``root``: without the ``module.`` of what DDP wraps."""
    if root is None or hasattr(root, "module"):
        return plan

    def own(name: str) -> str:
        return name.removeprefix("module.")

    def member_of(member: Member) -> Member:
        return own(member) if isinstance(member, str) else tuple(map(own, member))

    groups = tuple(tuple(map(member_of, group)) for group in plan.parallel)
    narrow = {own(name): units for name, units in plan.narrow.items()}
    return Plan(drop=tuple(map(own, plan.drop)), linear=tuple(map(own, plan.linear)), narrow=narrow, parallel=groups)


def cut(names: Mapping[fx.Node, str]) -> Cut:
    """What cut the graph that Dynamo hands to its backend from the rest of the model; "" if it is all of it."""
    if uncut_inputs() is not None:
        return "ddp"
    broken = is_broken()
    return "break" if broken or (broken is not None and _inner(names)) else ""


def _inner(names: Mapping[fx.Node, str]) -> list[fx.Node]:
    """The weights that the frame which is compiled gets through a module inside the root: its own ``self``."""
    return [node for node, name in names.items() if clean(name).endswith(f".{module_path(node)}")]


def guard_modules(gm: fx.GraphModule, names: Mapping[fx.Node, str]) -> None:
    """Let a graph that Dynamo made of a submodule's own frame serve that submodule alone.

    After a graph break inside a layer Dynamo compiles the layer's forward, and the one graph would serve all layers:
    their weights are its inputs. A plan tells layers apart. The graph learns what cut it from the rest.
    """
    if is_guarded():
        gm.meta[CUT] = cut(names)
        guard_identity({outermost_module(node) for node in _inner(names)})


def specialise(gm: fx.GraphModule) -> None:
    """Make numbers of those floats that modules hold (an eps, a multiplier) and ``dynamic=True`` made symbols of.

    As symbols they differ from layer to layer for all a compiler can tell, and no two norms are alike. Each gets a
    guard, so that a graph is made anew should one of them change; floats that are arguments of the call stay symbols.
    """
    changed = False
    for node in list(gm.graph.nodes):
        symbol = node.meta.get("example_value")
        if not isinstance(symbol, torch.SymFloat) or node.op == "placeholder":
            continue
        if any(source.op != "placeholder" or outermost_module(source) is None for source in node.all_input_nodes):
            continue
        numbers = {node: float(symbol)}  # this is what adds the guard
        for user in list(node.users):
            user.args = fx.map_arg(user.args, _replacing(numbers))
            user.kwargs = fx.map_arg(user.kwargs, _replacing(numbers))
        gm.graph.erase_node(node)
        changed = True
    if changed:
        gm.recompile()


def _replacing(numbers: Mapping[fx.Node, float]) -> Callable[[fx.Node], fx.node.Argument]:
    return lambda node: numbers.get(node, node)


def elsewhere(root: nn.Module | None, names: Mapping[fx.Node, str], plan: Plan) -> Callable[[str], bool]:
    """Whether a branch's name stands for a module that this graph does not hold: another does, or it was pruned.

    What was dropped before cannot be made linear, nor be narrowed.
    """
    if root is None:
        return lambda name: False
    modules = {clean(path): module for path, module in root.named_modules(remove_duplicate=False)}
    here = {clean(name) for name in names.values()}

    def test(name: str) -> bool:
        module = modules.get(name)
        if module is None:
            return False
        if is_dropped(module):
            return name not in plan.linear and name not in plan.narrow
        held = [clean(f"{name}.{own}") for own, _ in module.named_parameters()]
        return bool(held) and not any(path in here for path in held)

    return test
