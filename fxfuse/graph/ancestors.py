"""The ancestors of nodes: what they are computed from, and they themselves."""

from __future__ import annotations

from collections.abc import Container, Iterable

from torch import fx


def ancestors(nodes: Iterable[fx.Node], inside: Container[fx.Node] | None = None) -> set[fx.Node]:
    """``nodes`` and what they are computed from; only those ``inside``, by ways that do not leave it."""
    reached: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in reached and (inside is None or node in inside):
            reached.add(node)
            stack.extend(node.all_input_nodes)
    return reached
