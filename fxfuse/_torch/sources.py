"""Where a graph's inputs come from, as Dynamo writes it beside the graph. Seen on torch 2.11.0 and 2.13.0.

The public names of a graph's inputs are for reading: they do not tell two modules apart, and carry no guard.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import NNModuleSource
from torch._guards import Source as Source
from torch._guards import TracingContext


def source_text(node: fx.Node) -> str | None:
    """The source of an input as Python text: ``L['self']._modules['mlp']._parameters['weight']``."""
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return None
    name = source.name
    return name if isinstance(name, str) else str(name())


def outermost_module(node: fx.Node) -> Source | None:
    """The outermost module that an input's source goes through: the module whose frame it is."""
    owner, source = None, getattr(node, "_dynamo_source", None)
    while source is not None:
        owner = source.base if isinstance(source, NNModuleSource) else owner
        source = getattr(source, "base", None)
    return owner


def guard_identity(sources: Iterable[Source | None]) -> None:
    """Let the graph that is compiled serve only while these are the objects that they are."""
    context = TracingContext.try_get()
    for source in sources:
        if context is not None and source is not None:
            context.guards_context.dynamo_guards.add(source.make_guard(GuardBuilder.ID_MATCH))


def is_guarded() -> bool:
    """Whether a graph is being compiled that guards can be added to."""
    return TracingContext.try_get() is not None


def copy_sources(old: fx.Graph, new: fx.Graph) -> None:
    """Take the sources of inputs along, which are beside ``meta`` and no copy has."""
    for one, other in zip(old.find_nodes(op="placeholder"), new.find_nodes(op="placeholder"), strict=True):
        if hasattr(one, "_dynamo_source"):
            other._dynamo_source = one._dynamo_source


def copy_names(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Take along what AOTAutograd reads of Dynamo's graph modules: the sources of parameters, by name."""
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


def mark_static(placeholder: fx.Node) -> None:
    """Make an input one of those whose address stays, and that no guard watches, by Dynamo's own conventions."""
    placeholder._dynamo_source = None
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def mark_static_address(tensor: Tensor) -> None:
    """Let CUDA graphs read ``tensor`` where it is, instead of copying it at each call."""
    torch._dynamo.mark_static_address(tensor)


def example(node: fx.Node) -> Tensor | None:
    """The tensor that Dynamo traced an input with, while it lives: the fake one does not tell its class."""
    found = getattr(node.meta.get("grapharg"), "_example", None)
    held = found() if callable(found) else found
    return held if isinstance(held, Tensor) else None


def forget_inputs(graph: fx.Graph) -> None:
    """Drop the weak references to its inputs, as Dynamo does with those of its own graph.

    ``torch.utils.swap_tensors`` refuses a tensor that something refers to.
    """
    for node in graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)
