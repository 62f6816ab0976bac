"""Adapters: a product of two thin matrices beside a linear map, ``W x + c * B (A x)`` (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from itertools import permutations

from torch import fx

from fxfuse.ffn.projection import projection
from fxfuse.graph.ops import op
from fxfuse.graph.peel import Change, peel

REASON = (
    "an adapter (LoRA) is at work in it that is not merged, and its thin products stand beside the wide ones; peft's "
    "merge_adapter() makes it an FFN as any other"
)

_SCALED = Change.COPY | Change.ROWS | Change.WIDEN | Change.ROUND | Change.NUMBER


def adapted(nodes: Iterable[fx.Node], terms: Sequence[fx.Node], weights: Container[fx.Node]) -> bool:
    """Whether one of ``nodes`` adds to a linear map of a value what an adapter makes of it, or the ``terms`` do.

    Those are what a branch adds to the stream, one by one.
    """
    added = any(_are(base, thin, weights) for base, thin in permutations(terms, 2))
    return added or any(_adds(node, weights) for node in nodes)


def _adds(node: fx.Node, weights: Container[fx.Node]) -> bool:
    call = op(node)
    if call is None or call.name != "add":
        return False
    base, thin = call.node("input"), call.node("other")
    while base is not None and (call := op(base)) is not None and call.name == "add" and call.node("other"):
        base = call.node("input")  # of several adapters, one added after the other
    return base is not None and thin is not None and _are(base, thin, weights)


def _are(base: fx.Node, thin: fx.Node, weights: Container[fx.Node]) -> bool:
    whole = projection(peel(base, _SCALED), weights)
    up = projection(peel(thin, _SCALED), weights)
    down = projection(peel(up.input, _SCALED), weights) if up is not None else None
    if whole is None or up is None or down is None:
        return False
    return down.width < min(down.fan_in, up.width) and peel(down.input, _SCALED) is peel(whole.input, _SCALED)
