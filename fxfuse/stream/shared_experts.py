"""Why an FFN that stands beside routed experts is no branch of its own, where it is none.

A shared expert whose output is added to the stream like that of the routed ones is a term of the residual sum, and a
branch. Behind whatever takes the sum of both, a norm say, it is a part of theirs for good.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch import fx

from fxfuse.ffn.affine import NORMS
from fxfuse.ffn.anatomy import Recogniser
from fxfuse.graph.ops import op
from fxfuse.graph.peel import Change, layer
from fxfuse.graph.values import dtype
from fxfuse.stream.branch import Term
from fxfuse.stream.sums import flatten, is_sum


def beside(terms: Sequence[Term], body: Sequence[fx.Node], recogniser: Recogniser, constant: set[fx.Node]) -> str:
    """What ties an FFN to the rest of ``body``, in words; an empty string if there is no such FFN.

    Args:
        terms: what the branch adds to the stream.
        body: its nodes, in graph order.
        recogniser: of the graph.
        constant: the nodes that depend on weights alone.
    """
    inside = frozenset(body)
    if len(terms) > 1 and _holds_ffn(terms, inside, recogniser):
        return "both read what one projection made of the stream"
    for node in reversed(body):
        if is_sum(node, constant):
            parts = flatten(node, constant)
            if len(parts) > 1 and _holds_ffn(parts, inside, recogniser):
                return _above(node, body)
    return ""


def _holds_ffn(terms: Sequence[Term], inside: Container[fx.Node], recogniser: Recogniser) -> bool:
    """Whether one of several terms, and not all of them, is an FFN."""
    found = [recogniser.gate_up(term.node, inside.__contains__) is not None for term in terms]
    return any(found) and not all(found)


def _above(total: fx.Node, body: Sequence[fx.Node]) -> str:
    """What becomes of a sum before it reaches the stream."""
    above = {total}
    for node in body:
        if any(source in above for source in node.all_input_nodes):
            above.add(node)
    found = {node: named for node in body if node in above and node is not total and (named := op(node)) is not None}
    if any(each.name in NORMS or each.name in ("rsqrt", "var") for each in found.values()):
        return "a norm takes the sum of both"
    for node in found:
        if layer(node, Change.ROUND) is not None:
            return f"their sum is rounded to {str(dtype(node)).removeprefix('torch.')}"
    low = dtype(total)
    if any(each.name == "cast" and dtype(node) != low for node, each in found.items()):
        return f"their sum is rounded to {str(low).removeprefix('torch.')}"
    if any(each.name == "mul" and len(node.all_input_nodes) == 2 for node, each in found.items()):
        return "their sum is multiplied with another value"
    return "their sum is not what is added to the stream"
