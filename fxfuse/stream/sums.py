"""Residual sums: adds of which one term, the stream, is an ancestor of the others; and the chains that they form.

A sum may take the stream times a factor, ``a * h + b * f(h)``, and its result may be scaled before the next one takes
it, ``c * (h + f(h))``: :mod:`fxfuse.stream.steps`. Such factors stay where they are, whatever becomes of the sums.

The cost is linear in the graph: ancestry among the operands of adds is kept as bit sets.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fxfuse.graph.ops import mutated_arguments, op
from fxfuse.graph.order import overwritten
from fxfuse.graph.peel import PASSED, Change, layers
from fxfuse.graph.scale import ONE, Scale, as_scale
from fxfuse.graph.values import dtype, is_floating, same_shape, sizes_only, widens
from fxfuse.stream.branch import STAMP, Branch, Term
from fxfuse.stream.steps import way


@dataclass(eq=False)
class Sum:
    """One residual sum, nested adds flattened: ``out = stream + branches + extras``.

    ``extras`` are values that do not depend on the stream, and earlier points of it. ``write`` is one of the adds that
    writes in place, if one does: such a sum cannot be written anew.

    A contribution is scaled by every factor that comes after the place where it is added: those between ``out`` and the
    next sum, and that of the next sum's ``stream``. What is taken out of the sum, or added to it, leaves them alone:
    without its branches ``c * (a * h + b * f(h))`` is ``c * (a * h)``.
    """

    stream: Term
    out: fx.Node
    terms: tuple[Term, ...]
    branches: tuple[Branch, ...] = ()
    write: fx.Node | None = None

    @property
    def extras(self) -> tuple[Term, ...]:
        held = {term for branch in self.branches for term in branch.terms}
        return tuple(term for term in self.terms if term not in held)


def find_chains(gm: fx.GraphModule, constant: set[fx.Node]) -> list[tuple[Sum, ...]]:
    """The residual sums of ``gm`` as chains: each sum's stream is the out of the one before it.

    ``constant`` are the nodes that depend on weights alone.
    """
    closed: set[fx.Node] = set()
    while True:
        sums, scaled = _residual_sums(gm, constant, closed)
        if not scaled:
            return _chains(sums, constant)
        closed |= scaled


def is_sum(node: fx.Node, constant: set[fx.Node]) -> bool:
    call = op(node)
    if call is None or call.name not in ("add", "sub") or as_scale(call.args.get("alpha", 1)) is None:
        return False
    one, other = call.node("input"), call.node("other")
    if one is None or other is None or node in constant or not is_floating(node):
        return False
    return same_shape(one, other) and same_shape(one, node)


def flatten(
    node: fx.Node,
    constant: set[fx.Node],
    scale: Scale = ONE,
    closed: Container[fx.Node] = (),
    rewritten: Container[fx.Node] = (),
) -> list[Term]:
    """The terms of a sum; inner sums, also multiples of one, are opened as far as :func:`_opens` allows.

    Not so the operands in ``closed``. ``rewritten`` are the nodes whose memory is written after they are made.
    """
    terms: list[Term] = []
    call = op(node)
    assert call is not None
    alpha = as_scale(call.args.get("alpha", 1))
    assert alpha is not None
    for operand, factor in (
        (call.node("input"), ONE),
        (call.node("other"), alpha if call.name == "add" else -alpha),
    ):
        assert operand is not None
        if operand in closed:
            terms.append(Term(operand, scale * factor))
            continue
        inner, multiple = _alone(operand, factor)
        rounded = _rounded(inner, constant, rewritten)
        if rounded:
            terms.extend(Term(addend, scale * multiple) for addend in rounded)
        elif call.node("input") is not call.node("other") and _opens(inner, constant, rewritten):
            terms.extend(flatten(inner, constant, scale * multiple, closed, rewritten))
        else:
            terms.append(Term(operand, scale * factor))
    return terms


def _opens(node: fx.Node, constant: set[fx.Node], rewritten: Container[fx.Node]) -> bool:
    """Whether an inner sum is a part of the outer one: nothing else reads it, and no pass wrote it as one branch.

    What it adds up must still be there where the outer one stands, which is where a rewrite adds it up anew.
    """
    if len(node.users) > 1 or STAMP in node.meta or not is_sum(node, constant):
        return False
    return bool(mutated_arguments(node)) or not any(source in rewritten for source in node.all_input_nodes)


def _rounded(node: fx.Node, constant: set[fx.Node], rewritten: Container[fx.Node]) -> tuple[fx.Node, ...]:
    """The operands of ``(a.float() + b.float()).to(a.dtype)``, which is how ``a + b`` is computed; or none."""
    call = op(node)
    wide = call.node("input") if call is not None and call.name == "cast" and len(node.users) == 1 else None
    total = op(wide) if wide is not None and _opens(wide, constant, rewritten) else None
    if wide is None or total is None or total.name != "add" or total.args.get("alpha", 1) != 1 or total.inplace:
        return ()
    casts = [op(operand) for operand in (total.node("input"), total.node("other")) if operand is not None]
    sources = [cast.node("input") for cast in casts if cast is not None and cast.name == "cast"]
    own = tuple(source for source in sources if source is not None and dtype(source) == dtype(node) is not None)
    still = not any(source in rewritten for source in own)
    return own if len(own) == 2 and widens(node, wide) and still else ()


def _alone(node: fx.Node, scale: Scale) -> tuple[fx.Node, Scale]:
    """``node`` without what nothing else reads: numbers it is multiplied with, copies, widening casts, views.

    Adding the terms of ``(a + b).to(float32)`` to a float32 stream one by one casts each of them, by promotion. Those
    of ``(routed + shared).view(h.shape)`` keep the shape that they have.
    """
    for taken in layers(node, PASSED | Change.NUMBER, within=lambda inner: len(inner.users) == 1):
        # To open a sum in float32 that is cast to float64 would spare it a rounding of more than 1e-8.
        spared = dtype(taken.node) == torch.float64 != dtype(taken.source) and taken.change is Change.WIDEN
        if spared or (taken.change is Change.COPY and mutated_arguments(taken.node)):
            break
        node, scale = taken.source, scale * taken.scale
    return node, scale


def _residual_sums(
    gm: fx.GraphModule, constant: set[fx.Node], closed: Container[fx.Node]
) -> tuple[list[Sum], set[fx.Node]]:
    """The residual sums, none opened at ``closed``; and the multiples of others' sums that are to be closed as well.

    In ``c * (h + f(h)) + g(h)`` what is in brackets is a sum of its own: ``g(h)`` is added after the factor.
    """
    adds = [node for node in gm.graph.nodes if node.op != "placeholder" and is_sum(node, constant)]
    rewritten = overwritten(gm.graph)
    flattened: dict[fx.Node, list[Term]] = {}
    opened: set[fx.Node] = set()
    writes: dict[fx.Node, fx.Node | None] = {}
    for root in reversed(adds):  # an outer sum comes after those that it opens
        if root not in opened:
            flattened[root] = flatten(root, constant, closed=closed, rewritten=rewritten)
            between = _inside(root, flattened[root])
            opened |= between
            writes[root] = next((node for node in (root, *between) if mutated_arguments(node)), None)
    flattened = dict(reversed(flattened.items()))
    bit: dict[fx.Node, int] = {}
    ways = {term.node: way(term.node, constant) for terms in flattened.values() for term in terms}
    for nodes in ways.values():
        for node in nodes:
            bit.setdefault(node, 1 << len(bit))
    order: dict[fx.Node, int] = {}
    ancestors: dict[fx.Node, int] = {}
    sizes = sizes_only(gm.graph)
    for index, node in enumerate(gm.graph.nodes):
        order[node] = index
        mask = 0
        for source in node.all_input_nodes if node not in sizes else ():
            mask |= ancestors[source] | bit.get(source, 0)
        ancestors[node] = mask
    sums: list[Sum] = []
    scaled: set[fx.Node] = set()
    passed: dict[fx.Node, int] = {}  # out of a sum -> bits of all points of its chain so far
    added: dict[fx.Node, int] = {}  # out of a sum -> bits of those and of all that was added to them
    for root, terms in flattened.items():
        data = sorted((t for t in terms if t.node not in constant), key=lambda t: order[t.node])
        # The others may read the stream before the cast or the factor through which the sum takes it. A sum of a lower
        # precision than the stream has, which rounds what it adds up, would come out otherwise elsewhere.
        own = {t.node: _bits(root, ways[t.node], bit) for t in terms}
        stream = next((t for t in data if _feeds(own[t.node], t, terms, ancestors)), None)
        if stream is not None:
            # The others may descend from a value that was added to the stream before, or from an earlier point of it.
            start = own[stream.node]
            stream = next((t for t in reversed(data) if start & added.get(ways[t.node][-1], 0)), stream)
        else:
            # Ladder residuals (arXiv 2501.06589): the branch reads an earlier point of the stream it is added to.
            stream = next((t for t in data if _feeds(passed.get(ways[t.node][-1], 0), t, terms, ancestors)), None)
        if stream is None or [t.node for t in terms].count(stream.node) > 1:
            continue
        multiple = None if stream.scale.is_one else _multiple(root, stream.node, constant, closed, rewritten)
        if multiple is not None:
            scaled.add(multiple)
            continue
        sums.append(Sum(stream, root, tuple(t for t in terms if t is not stream), write=writes[root]))
        base = ways[stream.node][-1]
        passed[root] = passed.get(base, 0) | own[stream.node]
        added[root] = added.get(base, 0) | sum({bit[t.node] for t in terms})
    return sums, scaled


def _bits(total: fx.Node, nodes: list[fx.Node], bit: Mapping[fx.Node, int]) -> int:
    """The bits of a term and of all that it is but a link or a factor of, as far as ``total`` is as wide as those."""
    bits = bit[nodes[0]]
    for node in nodes if widens(nodes[0], total) else ():
        if not widens(node, total):
            break
        bits |= bit[node]
    return bits


def _multiple(
    root: fx.Node,
    stream: fx.Node,
    constant: set[fx.Node],
    closed: Container[fx.Node],
    rewritten: Container[fx.Node],
) -> fx.Node | None:
    """The operand that is a multiple of an inner sum which holds ``stream``, if there is one."""
    call = op(root)
    for name in ("input", "other"):
        operand = call.node(name) if call is not None else None
        if call is None or operand is None or operand is stream or operand in closed:
            continue
        inner, multiple = _alone(operand, ONE)
        rounded = _rounded(inner, constant, rewritten)
        opens = not rounded and _opens(inner, constant, rewritten)
        opened = flatten(inner, constant, closed=closed, rewritten=rewritten) if opens else []
        if stream not in (*rounded, *(term.node for term in opened)):
            continue
        taken_as_it_is = name == "input" or (call.name == "add" and call.args.get("alpha", 1) == 1)
        if not (multiple.is_one and taken_as_it_is):
            return operand
        return _multiple(inner, stream, constant, closed, rewritten) if opened else None
    return None


def _inside(root: fx.Node, terms: list[Term]) -> set[fx.Node]:
    """The nodes between a sum and its terms."""
    ends = {term.node for term in terms}
    between: set[fx.Node] = set()
    stack = [root]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in ends and source not in between:
                between.add(source)
                stack.append(source)
    return between


def _feeds(bits: int, stream: Term, terms: list[Term], ancestors: Mapping[fx.Node, int]) -> bool:
    """Whether another term of the sum depends on one of the nodes that ``bits`` stands for."""
    return any(ancestors[term.node] & bits for term in terms if term is not stream)


def _chains(sums: list[Sum], constant: Container[fx.Node]) -> list[tuple[Sum, ...]]:
    """The sums as chains, each sum in one; where a stream forks, the longer arm goes on."""
    by_out = {residual.out: residual for residual in sums}
    previous: dict[Sum, Sum] = {}
    for residual in sums:
        base = way(residual.stream.node, constant)[-1]
        if base in by_out:
            previous[residual] = by_out[base]
    length: dict[Sum, int] = dict.fromkeys(sums, 1)
    following: dict[Sum, Sum] = {}
    for residual in reversed(sums):
        before = previous.get(residual)
        if before is not None and length[residual] + 1 > length[before]:
            length[before] = length[residual] + 1
            following[before] = residual
    heads = [
        residual for residual in sums if residual not in previous or following.get(previous[residual]) is not residual
    ]
    chains: list[tuple[Sum, ...]] = []
    for head in heads:
        chain = [head]
        while chain[-1] in following:
            chain.append(following[chain[-1]])
        chains.append(tuple(chain))
    return chains
