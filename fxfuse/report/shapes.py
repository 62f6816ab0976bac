"""A model as a layout of shapes, which `fxfuse.hardware` prices: its branches off the graph, its cache off a call.

Sliding windows are not looked for: each attention is taken to read the whole context.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from fxfuse.backend.frontend import Captured, capture
from fxfuse.data.batches import cache_of
from fxfuse.errors import CaptureError
from fxfuse.graph.values import last_dim, shape
from fxfuse.hardware.layout import Kind, Layout, Part, Shape
from fxfuse.model.force import uncompiled
from fxfuse.passes import simplify
from fxfuse.stream.branch import Branch
from fxfuse.stream.finder import find_streams

_KINDS: dict[str, Kind] = {"attention": "attention", "gated_ffn": "ffn", "ffn": "ffn", "linear": "linear"}


def layout_of(model: nn.Module, input_ids: Tensor, name: str) -> Layout:
    """The layout of a language model, as a call with ``input_ids`` ``[batch, tokens]`` shows it. It stays as it is.

    Raises:
        CaptureError: it is traced to several graphs or has not one stream; a branch is none that can be priced; or what
            it returns holds no logits, or keeps no cache for each attention.
    """
    captured = capture(model, input_ids=input_ids, use_cache=False)
    if len(captured) != 1:
        raise CaptureError(f"{name} is traced to {len(captured)} graphs; what is priced is a model of one graph")
    (graph,) = captured
    simplify(graph.gm)
    streams = find_streams(graph.gm, graph.names)
    if len(streams) != 1:
        raise CaptureError(f"{name} has {len(streams)} residual streams; what is priced is a model of one")
    (stream,) = streams
    logits, caches = _call(model, input_ids, name)
    attentions = [branch.name for branch in stream.branches if branch.kind == "attention"]
    if len(attentions) != len(caches):
        raise CaptureError(f"{name} has {len(attentions)} attentions, and keeps keys and values of {len(caches)}")
    held = dict(zip(attentions, caches, strict=True))
    d = last_dim(stream.points[0])
    assert isinstance(d, int)
    parts = [Part(tuple(_shape(branch, graph, d, held) for branch in each.branches)) for each in stream.sums]
    vocabulary = logits.shape[-1]
    tables = sum(tuple(parameter.shape) == (vocabulary, d) for parameter in model.parameters())
    return Layout(name, d, vocabulary, tuple(parts), tied=tables == 1)


def _call(model: nn.Module, input_ids: Tensor, name: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """The logits; and of each layer's cache how many numbers it keeps of a token of one sequence, in how many heads."""
    with torch.no_grad(), uncompiled(model):
        output = model(input_ids=input_ids, use_cache=True)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise CaptureError(f"{name} returns no logits; what is priced is a language model, as transformers has them")
    caches = []
    for layer in getattr(cache_of(output), "layers", ()):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.numel():
            caches.append((keys.shape[1] * keys.shape[-1] + values.shape[1] * values.shape[-1], keys.shape[1]))
    return logits, caches


def _shape(branch: Branch, graph: Captured, d: int, held: dict[str, tuple[int, int]]) -> Shape:
    kind = _KINDS.get(branch.kind)
    if kind is None:
        raise CaptureError(f"{branch.name} is of kind {branch.kind}; attentions, FFNs and linear maps can be priced")
    weights = sum(_numbers(node) for node in branch.parameters)
    if kind == "attention":
        cache, heads = held[branch.name]
        return Shape(branch.name, kind, weights, cache=cache, heads=heads)
    width = branch.gate_up.projections[0].width if branch.gate_up is not None and kind == "ffn" else 0
    return Shape(branch.name, kind, weights, width, joins=branch.ffn is not None)


def _numbers(node: fx.Node) -> int:
    """Of a matrix; vectors, as of norms and biases, weigh nothing beside it."""
    sizes = shape(node) or ()
    return math.prod(size for size in sizes if isinstance(size, int)) if len(sizes) > 1 else 0
