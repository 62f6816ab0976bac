"""Graphs of a model, by every road that the library accepts, and of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn


def capture(model: nn.Module, *args: Tensor, dynamic: bool = False) -> tuple[fx.GraphModule, Callable[..., Any]]:
    """The one Dynamo graph of ``model``, and the compiled model, which runs that graph as it is when called."""
    caught: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        caught.append(gm)
        return lambda *inputs: gm(*inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        compiled(*args)
    (gm,) = caught
    return gm, compiled


def exported(model: nn.Module, *args: Tensor, strict: bool) -> fx.GraphModule:
    """The graph of torch.export; it takes the model's own arguments and owns the parameters."""
    with torch.no_grad():
        module = torch.export.export(model, args, strict=strict).module()
    assert isinstance(module, fx.GraphModule)
    return module


def graph_of(f: Callable[..., object]) -> fx.Graph:
    """The graph of a function, as symbolic tracing writes it."""
    return fx.Tracer().trace(f)


def node_of(graph: fx.Graph, name: str) -> fx.Node:
    (node,) = [node for node in graph.nodes if node.name == name]
    return node


def as_tuple(outputs: Tensor | tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
