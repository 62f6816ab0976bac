"""Weights of tensor classes of their own, such as quantized ones: they know a linear map, and perhaps not ``cat``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxfuse._torch.fake import FakeTensor, is_traceable_wrapper_subclass
from fxfuse._torch.sources import example
from fxfuse.graph.sharded import local_part
from fxfuse.graph.values import value


def unpackable(weights: Iterable[fx.Node | None]) -> str:
    """Why ``weights``, expressions of weights alone, cannot be packed with others; an empty string if they can."""
    seen: set[fx.Node] = set()
    stack = [node for node in weights if node is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for held in (value(node), example(node)):
            if held is not None and _is_special(held):
                name = type(held).__name__
                return f"its weights are of the tensor class {name}, and only plain tensors can be packed into one"
        stack.extend(node.all_input_nodes if node.target is not local_part else ())  # which is a plain tensor
    return ""


def _is_special(held: torch.Tensor) -> bool:
    """Whether the class of ``held`` says itself what ops do: a subclass that only adds attributes does not."""
    if isinstance(held, FakeTensor):
        return False
    if is_traceable_wrapper_subclass(held) or _own(held, "__torch_dispatch__"):
        return True
    return _own(held, "__torch_function__")


def _own(held: torch.Tensor, name: str) -> bool:
    known = [getattr(each, name) for each in (torch.Tensor, torch.nn.Parameter)]
    found = getattr(type(held), name)
    return all(getattr(found, "__func__", found) is not getattr(each, "__func__", each) for each in known)
