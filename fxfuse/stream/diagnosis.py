"""What a graph holds in which no residual stream was found: what was seen instead, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass

from torch import fx

from fxfuse.ffn.projection import mixes
from fxfuse.graph.constant import weight_only
from fxfuse.graph.ops import op
from fxfuse.graph.peel import Change, layer, peel
from fxfuse.graph.values import parameters, same_shape, shape
from fxfuse.stream.steps import FACTORS, LINKS, keeps
from fxfuse.stream.sums import find_chains, is_sum

REPORT = "if this model is a transformer, please report it with what `fxfuse explain MODEL --trace FOLDER` writes"


OPAQUE = {
    "_transformer_encoder_layer_fwd": (
        "PyTorch computes whole encoder layers as one op each; torch.backends.mha.set_fastpath_enabled(False) before "
        "the model is called shows what they consist of"
    ),
    "invoke_subgraph": "torch.compiler.nested_compile_region makes one op of each region; without it they are traced",
}
"""Ops that hold branches inside, and how to have them traced."""


@dataclass(frozen=True)
class Census:
    """What stands in a graph.

    Attributes:
        nodes: how many.
        products: matrix products and attentions, by the name of their op.
        adds: adds of two values of one shape that depend on the input.
        sums: those among them of which one operand descends from the other: residual sums.
        scaled: others of which one operand descends from what the other is a multiple of: ``M @ h + f(h)``.
        rounded: those of which one operand descends from what the other is the rounded value of: ``round(h) + f(h)``.
        unknown: calls that the vocabulary has no name for, the most frequent first.
    """

    nodes: int
    products: dict[str, int]
    adds: int
    sums: int
    scaled: int
    rounded: int
    unknown: dict[str, int]

    @property
    def counts(self) -> str:
        """How much there is of each."""
        products = ", ".join(f"{count} {name}" for name, count in self.products.items()) or "no matrix product"
        return f"{self.nodes:,} nodes: {products}; {self.adds} adds of two values of one shape, {self.sums} residual"

    def __str__(self) -> str:
        unknown = ", ".join(f"{count} {name}" for name, count in list(self.unknown.items())[:5])
        return f"{self.counts}; {self.why}" + (f"; ops without a name here: {unknown}" if unknown else "")

    @property
    def why(self) -> str:
        """Why these are no stream with branches."""
        for name, hint in OPAQUE.items():
            if name in self.unknown:
                return hint
        if not self.products:
            return "nothing mixes features, so nothing could be a branch"
        if not self.adds:
            return "nothing is added to a value of its own shape"
        if self.scaled > self.sums:
            return (
                f"{self.scaled} sums multiply the stream itself with more than numbers and vectors of weights, as in "
                "M @ h + f(h): such a sum is no h + f(h), so nothing can be dropped from it or moved along it"
            )
        if self.rounded > self.sums:
            return f"{self.rounded} sums are computed in a lower precision than the stream has, and round it"
        if not self.sums:
            return "no sum has an operand that the other one is computed from"
        return "no matrix product stands between a residual sum and what it adds to"


def census(gm: fx.GraphModule) -> Census:
    """Count what ``gm`` holds. Changes nothing and adds no guards."""
    constant = weight_only(gm, parameters(gm))
    products: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    for node in gm.graph.nodes:
        found = op(node)
        if found is not None and mixes(node):
            products[found.name] += 1
        elif found is None and node.op in ("call_function", "call_method", "call_module") and node not in constant:
            unknown[str(getattr(node.target, "__name__", node.target))] += 1
    adds = [node for node in gm.graph.nodes if node.op != "placeholder" and is_sum(node, constant)]
    sums = {each.out for chain in find_chains(gm, constant) for each in chain}
    others = [node for node in adds if node not in sums]
    return Census(
        nodes=len(gm.graph.nodes),
        products=dict(products.most_common()),
        adds=len(adds),
        sums=len(sums),
        scaled=sum(_scales_its_stream(node, constant) for node in others),
        rounded=sum(_rounds_its_stream(node) for node in others),
        unknown=dict(unknown.most_common()),
    )


def _scales_its_stream(add: fx.Node, constant: Container[fx.Node]) -> bool:
    """Whether ``add`` is ``c * h + f(h)`` with c a number, a weight or a matrix, and a matrix product in f."""
    found = op(add)
    pair = [found.node("input"), found.node("other")] if found is not None else []
    for one, other in (pair, pair[::-1]):
        stream = _multiplied(one, constant) if one is not None else None
        if stream is not None and other is not None and _comes_through_a_product(other, stream):
            return True
    return False


def _rounds_its_stream(add: fx.Node) -> bool:
    """Whether ``add`` is ``round(h) + f(h)``, with a matrix product in f."""
    pair = add.all_input_nodes
    return any(
        not keeps(add, one) and _comes_through_a_product(other, peel(one, LINKS))
        for one, other in zip(pair, pair[::-1], strict=True)
    )


_TIMES = Change.NUMBER | Change.GAIN | Change.DIVISOR | Change.MASK


def _multiplied(node: fx.Node, constant: Container[fx.Node]) -> fx.Node | None:
    """``x``, if ``node`` is x times a number, a weight or a matrix; weights may be added to x before."""
    times = False
    while (found := op(node)) is not None:
        taken = layer(node, LINKS | FACTORS | Change.MASK | Change.TABLE, constant)
        before = None if taken is None else taken.source
        if before is None and found.name in ("matmul", "bmm") and not times:
            sides = (found.node("other"), found.node("input"))
            before = next(
                (side for side in sides if side is not None and side not in constant and _like(side, node)), None
            )
            times = before is not None
        if before is None:
            break
        times = times or (taken is not None and taken.change in _TIMES)
        node = before
    return node if times else None


def _like(one: fx.Node, other: fx.Node) -> bool:
    return shape(one) is not None and same_shape(one, other)


def _comes_through_a_product(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` descends from ``source``, with a matrix product between or before."""
    seen, stack, product = {node}, [node], False
    while stack:
        node = stack.pop()
        if node is source:
            return product
        product = product or mixes(node)
        new = [each for each in node.all_input_nodes if each not in seen]
        seen.update(new)
        stack.extend(new)
    return False
