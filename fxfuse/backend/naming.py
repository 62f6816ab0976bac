"""Names of weights as the user's model has them.

Dynamo tells where a graph's inputs come from, seen from the frame it compiled: after a graph break inside a layer that
is the layer, and ``mlp`` is all it says. The module that was compiled is on the Python stack while a backend runs, and
its parameters are the very objects that the graph gets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

import torch
from torch import fx, nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.source import NNModuleSource
from torch._dynamo.symbolic_convert import InstructionTranslator

from fxfuse.graph import values
from fxfuse.graph.values import clean, module_path, unwrapped
from fxfuse.model.pruning import is_dropped
from fxfuse.passes.pipeline import CUT, Cut
from fxfuse.plan import Member, Plan


def compiled_root() -> nn.Module | None:
    """The module whose compiled call is running: the innermost one on the stack; None under ``torch.compile(fn)``.

    Of one that DDP wraps, the one that it wraps.
    """
    for frame in _stack():
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch._dynamo.OptimizedModule):
            return unwrapped(owner._orig_mod)
        if isinstance(owner, nn.Module) and getattr(owner, "_compiled_call_impl", None) is not None:
            return unwrapped(owner)
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


def names_in(root: nn.Module | None, gm: fx.GraphModule, inputs: Sequence[object]) -> dict[fx.Node, str]:
    """The dotted names, from ``root``, of those inputs of the graph that are its parameters or buffers; or none."""
    if root is None:
        return {}
    whole = _whole()
    if whole is None:
        return values.names_in(root, gm, inputs)
    given = [whole.get(node.name) for node in gm.graph.find_nodes(op="placeholder")]
    return values.names_in(root, gm, given)


def _whole() -> dict[str, object] | None:
    """The inputs, by name, of the graph that DDP has cut where its buckets end; None if no such graph is compiled.

    Its parts have the same names for the same inputs, and fake tensors in their places.
    """
    for frame in _stack():
        if frame.f_code.co_name == "compile_fn" and isinstance(frame.f_locals.get("self"), DDPOptimizer):
            gm, inputs = frame.f_locals["gm"], frame.f_locals["example_inputs"]
            return {node.name: each for node, each in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)}
    return None


def for_root(plan: Plan, root: nn.Module | None) -> Plan:
    """``plan`` with the names that its branches have in ``root``: without the ``module.`` of what DDP wraps."""
    if root is None or hasattr(root, "module"):
        return plan

    def own(name: str) -> str:
        return name.removeprefix("module.")

    def member_of(member: Member) -> Member:
        return own(member) if isinstance(member, str) else tuple(map(own, member))

    groups = tuple(tuple(map(member_of, group)) for group in plan.parallel)
    return Plan(drop=tuple(map(own, plan.drop)), parallel=groups)


def cut(names: Mapping[fx.Node, str]) -> Cut:
    """What cut the graph that Dynamo hands to its backend from the rest of the model; "" if it is all of it."""
    if _whole() is not None:
        return "ddp"
    try:
        tx = InstructionTranslator.current_tx()
    except AttributeError:  # nothing is being traced
        return ""
    reason = tx.output.compile_subgraph_reason
    resumed = tx.f_code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)
    return "break" if resumed or (reason is not None and reason.graph_break) or _inner(names) else ""


def _inner(names: Mapping[fx.Node, str]) -> list[fx.Node]:
    """The weights that the frame which is compiled gets through a module inside the root: its own ``self``."""
    return [node for node, name in names.items() if clean(name).endswith(f".{module_path(node)}")]


def guard_modules(gm: fx.GraphModule, names: Mapping[fx.Node, str]) -> None:
    """Let a graph that Dynamo made of a submodule's own frame serve that submodule alone.

    After a graph break inside a layer Dynamo compiles the layer's forward, and the one graph would serve all layers:
    their weights are its inputs. A plan tells layers apart. The graph learns what cut it from the rest.
    """
    context = torch._guards.TracingContext.try_get()
    if context is None:
        return
    gm.meta[CUT] = cut(names)
    for owner in {_owner(node) for node in _inner(names)}:
        if owner is not None:
            context.guards_context.dynamo_guards.add(owner.make_guard(GuardBuilder.ID_MATCH))


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
        if any(source.op != "placeholder" or _owner(source) is None for source in node.all_input_nodes):
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
