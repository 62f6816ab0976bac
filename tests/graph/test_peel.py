"""What the table says of an op is so: the op computes the promised function of what is left without it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from fxfuse.graph.ops import op
from fxfuse.graph.peel import TABLE, Change, Layer, hides_its_sizes, layer, layers, peel
from fxfuse.graph.values import value
from tests.properties.examples import examples

EVERY = ~Change(0)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def call(graph: fx.Graph, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> fx.Node:
    """A call, and what it computes, which stands for it as a tracer's value would."""
    kwargs = kwargs or {}
    node = graph.call_method(target, tuple(args), kwargs) if isinstance(target, str) else None
    node = node or graph.call_function(target, tuple(args), kwargs)
    held = fx.map_arg((tuple(args), kwargs), lambda source: source.meta["example_value"])
    function = getattr(torch.Tensor, target) if isinstance(target, str) else target
    node.meta["example_value"] = function(*held[0], **held[1])
    return node


def holding(graph: fx.Graph, name: str, held: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["example_value"] = held
    return node


def promised(taken: Layer) -> Tensor:
    """The value of the layer's node, by its change, from that of its source."""
    x, made = value(taken.source), value(taken.node)
    assert x is not None and made is not None and not taken.scale.nodes
    weight = value(taken.weight) if taken.weight is not None else None
    match taken.change:
        case Change.COPY:
            return x
        case Change.ROWS:
            assert x.shape[-1] == made.shape[-1]
            return x.reshape(made.shape)
        case Change.WIDEN:
            assert torch.equal(made.to(x.dtype), x)
            return x.to(made.dtype)
        case Change.ROUND:
            return x.to(made.dtype)
        case Change.NUMBER:
            return taken.scale.number * x
    assert weight is not None
    if taken.change not in Change.MASK | Change.TABLE:
        assert weight.numel() == 1 or (weight.shape[-1] == weight.numel() == made.shape[-1] == x.shape[-1])
    added = op(taken.node)
    assert added is not None
    if added.name in ("add", "sub"):
        return taken.scale.number * x + taken.share * weight
    return x / weight if added.name == "div" else x * weight


VIEWS: tuple[Callable[[fx.Graph, fx.Node, Tensor, int, int], fx.Node], ...] = (
    lambda graph, x, held, one, other: call(graph, "view", (x, -1, held.shape[-1])),
    lambda graph, x, held, one, other: call(graph, "reshape", (x, -1)),
    lambda graph, x, held, one, other: call(graph, torch.reshape, (x, (held.shape[-1], -1))),
    lambda graph, x, held, one, other: call(graph, torch.flatten, (x, min(one, other), max(one, other))),
    lambda graph, x, held, one, other: call(graph, "unflatten", (x, one, (1, -1))),
    lambda graph, x, held, one, other: call(graph, "squeeze", (x, one)),
    lambda graph, x, held, one, other: call(graph, "unsqueeze", (x, one)),
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[fx.Node, set[fx.Node]]:
    """A call of an op of the table on random values, and the nodes that are weights."""
    graph = fx.Graph()
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    held = torch.randn(sizes, dtype=draw(st.sampled_from(FLOATS)), generator=generator)
    x = holding(graph, "x", held)
    dims = st.integers(-len(sizes), len(sizes) - 1)
    name = draw(st.sampled_from(sorted(TABLE.keys() - {"all_reduce"})))  # which takes several processes
    if TABLE[name] is Change.ROWS:
        one, other = (draw(dims) % len(sizes) for _ in range(2))
        return draw(st.sampled_from(VIEWS))(graph, x, held, one, other), set()
    match name:
        case "contiguous" | "clone":
            return call(graph, name, (x,)), set()
        case "dropout":
            p, training = draw(st.sampled_from([(0.5, False), (0.0, True), (0.5, True)]))
            return call(graph, F.dropout, (x, p, training)), set()
        case "cast":
            return call(graph, "to", (x, draw(st.sampled_from((*FLOATS, torch.int64))))), set()
        case "neg":
            return call(graph, operator.neg, (x,)), set()
    x.meta["example_value"] = held = held.double()
    function = getattr(torch, name)
    kwargs: dict[str, Any] = {"alpha": draw(st.sampled_from([1, 0.5, -2]))} if name in ("add", "sub") else {}
    if name == "div":
        kwargs = draw(st.sampled_from([{}, {"rounding_mode": "floor"}]))
    if name in ("mul", "div") and draw(st.booleans()):
        return call(graph, function, (x, draw(st.sampled_from([0.3, -2, 7]))), kwargs), set()
    last = sizes[-1:]
    shapes = [[], [1], [1] * 5, last, [1] * 5 + last, sizes, [2, *sizes], [3] if last == [1] else last]
    weight = holding(graph, "w", torch.randn(draw(st.sampled_from(shapes)), generator=generator).double())
    pair = (x, weight) if draw(st.booleans()) else (weight, x)
    return call(graph, function, pair, kwargs), draw(st.sampled_from([{weight}, {weight}, {weight, x}]))


@given(drawn=calls())
@examples(400)
def test_an_op_that_is_taken_off_computes_what_its_change_promises(drawn: tuple[fx.Node, set[fx.Node]]) -> None:
    node, weights = drawn
    taken = layer(node, EVERY, weights)
    if taken is None:
        return
    assert taken.change in TABLE[op(node).name]  # type: ignore[union-attr]  # it has a name: it is in the table
    made = value(node)
    assert made is not None
    if taken.change in Change.COPY | Change.ROWS | Change.WIDEN | Change.ROUND:
        assert torch.equal(made, promised(taken))
    else:
        torch.testing.assert_close(made, promised(taken), rtol=0, atol=1e-12)


X, W, TALL = torch.randn(2, 3, 4).double(), torch.rand(4).double(), torch.randn(3, 4).double()

TAKEN: dict[str, tuple[Callable[[fx.Graph, fx.Node, fx.Node, fx.Node], fx.Node], Change | None]] = {
    "a copy": (lambda g, x, w, tall: call(g, "contiguous", (x,)), Change.COPY),
    "idle dropout": (lambda g, x, w, tall: call(g, F.dropout, (x, 0.5, False)), Change.COPY),
    "active dropout": (lambda g, x, w, tall: call(g, F.dropout, (x, 0.5, True)), None),
    "tokens in one dimension": (lambda g, x, w, tall: call(g, "view", (x, -1, 4)), Change.ROWS),
    "a dimension of one more": (lambda g, x, w, tall: call(g, "unsqueeze", (x, 0)), Change.ROWS),
    "a split of the last dimension": (lambda g, x, w, tall: call(g, "view", (x, 2, 3, 2, 2)), None),
    "rows of another length": (lambda g, x, w, tall: call(g, "flatten", (x, 1)), None),
    "a cast to less": (lambda g, x, w, tall: call(g, "float", (x,)), Change.ROUND),
    "a cast to the same": (lambda g, x, w, tall: call(g, "double", (x,)), Change.WIDEN),
    "a number": (lambda g, x, w, tall: call(g, torch.mul, (2, x)), Change.NUMBER),
    "a quotient of a number": (lambda g, x, w, tall: call(g, torch.div, (x, 2)), Change.NUMBER),
    "a gain": (lambda g, x, w, tall: call(g, torch.mul, (w, x)), Change.GAIN),
    "a divisor": (lambda g, x, w, tall: call(g, torch.div, (x, w)), Change.DIVISOR),
    "a weight over a value": (lambda g, x, w, tall: call(g, torch.div, (w, x)), None),
    "a rounded quotient": (lambda g, x, w, tall: call(g, torch.div, (x, w), {"rounding_mode": "floor"}), None),
    "a shift": (lambda g, x, w, tall: call(g, torch.sub, (w, x), {"alpha": 3}), Change.SHIFT),
    "a table of positions": (lambda g, x, w, tall: call(g, torch.add, (x, tall)), Change.TABLE),
    "a mask": (lambda g, x, w, tall: call(g, torch.mul, (tall, x)), Change.MASK),
    "a product of two values": (lambda g, x, w, tall: call(g, torch.mul, (x, x)), None),
    "a function": (lambda g, x, w, tall: call(g, torch.tanh, (x,)), None),
}


@pytest.mark.parametrize("name", TAKEN)
def test_an_op_is_taken_off_by_the_change_it_makes_and_by_no_other(name: str) -> None:
    graph, (made, change) = fx.Graph(), TAKEN[name]
    x, w, tall = holding(graph, "x", X), holding(graph, "w", W), holding(graph, "tall", TALL)
    node = made(graph, x, w, tall)

    taken = layer(node, EVERY, {w, tall})

    assert (taken.change if taken is not None else None) == change
    assert taken is None or (taken.source is x and layer(node, EVERY & ~taken.change, {w, tall}) is None)


@pytest.mark.parametrize(("read", "change"), [(torch.bfloat16, Change.WIDEN), (torch.float32, Change.ROUND)])
def test_a_cast_that_rounds_no_further_than_the_value_is_read_loses_nothing(read: torch.dtype, change: Change) -> None:
    graph = fx.Graph()
    node = call(graph, "to", (holding(graph, "x", X.float()), torch.bfloat16))

    taken = layer(node, EVERY, read=read)

    assert taken is not None and taken.change == change


def test_without_sizes_nothing_is_a_view_of_rows() -> None:
    graph = fx.Graph()
    node = graph.call_method("view", (graph.placeholder("x"), -1, 4))

    assert layer(node, EVERY) is None and hides_its_sizes(node)


def test_layers_come_off_from_the_outside_until_one_is_not_allowed() -> None:
    graph = fx.Graph()
    x = holding(graph, "x", X)
    scaled = call(graph, torch.mul, (x, 2.0))
    flat = call(graph, "view", (scaled, 6, 4))
    copy = call(graph, "contiguous", (flat,))

    assert [taken.node for taken in layers(copy, EVERY)] == [copy, flat, scaled]
    assert peel(copy, EVERY) is x
    assert peel(copy, Change.COPY | Change.ROWS) is scaled
    assert peel(copy, EVERY, within=lambda node: node is not flat) is flat
    assert peel(scaled, Change.COPY) is scaled
