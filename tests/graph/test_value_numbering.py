"""Two nodes have one number exactly if they are the same pure ops on the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxfuse.graph.value_numbering import Numbering


def results(f: Callable[..., object]) -> list[fx.Node]:
    """The nodes that a function returns, as symbolic tracing writes them."""
    graph = fx.Tracer().trace(f)
    return list(graph.output_node().args[0])


def numbers(f: Callable[..., object]) -> list[int]:
    numbering = Numbering()
    return [numbering[node] for node in results(f)]


ALIKE: dict[str, Callable[..., object]] = {
    "itself": lambda x, y: (x, x),
    "an expression": lambda x, y: (torch.rsqrt(x.pow(2).mean(-1) + 1e-6), torch.rsqrt(x.pow(2).mean(-1) + 1e-6)),
    "another order of a sum": lambda x, y: (x + y, y + x),
    "another order of a product": lambda x, y: (x * 2, 2 * x),
    "another spelling": lambda x, y: (x + y, torch.add(x, y)),
    "a method": lambda x, y: (x.mul(y), x * y),
    "a keyword": lambda x, y: (torch.softmax(x, -1), torch.softmax(x, dim=-1)),
    "an op that no table knows": lambda x, y: (torch.lerp(x, y, 0.5), torch.lerp(x, y, 0.5)),
    "a slice": lambda x, y: (x[..., 2:4], x[..., 2:4]),
}
DIFFERENT: dict[str, Callable[..., object]] = {
    "inputs": lambda x, y: (x, y),
    "an epsilon": lambda x, y: (x + 1e-5, x + 1e-6),
    "a type of number": lambda x, y: (x + 1, x + 1.0),
    "a truth value": lambda x, y: (x + 1, x + True),
    "an order that matters": lambda x, y: (x - y, y - x),
    "an order that matters in a product": lambda x, y: (x @ y, y @ x),
    "a scaled operand": lambda x, y: (torch.add(x, y, alpha=2), torch.add(y, x, alpha=2)),
    "a dimension": lambda x, y: (torch.softmax(x, -1), torch.softmax(x, 0)),
    "an axis list": lambda x, y: (x.mean((0, 1)), x.mean((0, -1))),
    "a slice": lambda x, y: (x[..., 2:4], x[..., 2:5]),
    "an approximation": lambda x, y: (F.gelu(x), F.gelu(x, approximate="tanh")),
    "the dtype": lambda x, y: (x.to(torch.float32), x.to(torch.bfloat16)),
    "unknown ops": lambda x, y: (torch.lerp(x, y, 0.5), torch.lerp(x, y, 0.25)),
    "a keyword of an unknown op": lambda x, y: (torch.cumsum(x, dim=0), torch.cumsum(x, dim=1)),
    "positions of an unknown op": lambda x, y: (torch.roll(x, 1, 0), torch.roll(x, 0, 1)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_the_same_computation_has_the_same_number(name: str) -> None:
    one, other = numbers(ALIKE[name])

    assert one == other


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_difference_gives_another_number(name: str) -> None:
    one, other = numbers(DIFFERENT[name])

    assert one != other


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5, True),
    "rand_like": torch.rand_like,
    "bernoulli": torch.bernoulli,
    "a write": lambda x: x.add_(1),
}


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_random_or_writes_equals_only_itself(name: str) -> None:
    function = RANDOM[name]

    one, other, derived, alike = numbers(lambda x: (function(x), function(x), function(x) + 1, function(x) + 1))

    assert len({one, other, derived, alike}) == 4


def test_leaves_make_two_subgraphs_comparable() -> None:
    one, other, third = results(lambda x, y, z: (x.pow(2) + 1, y.pow(2) + 1, z.pow(2) + 1))
    inputs = {node.name: node for node in one.graph.nodes if node.op == "placeholder"}

    numbering = Numbering({inputs["x"]: "stream", inputs["y"]: "stream", inputs["z"]: "another"})

    assert numbering[one] == numbering[other]
    assert numbering[one] != numbering[third]


def test_a_deep_graph_needs_no_deep_stack() -> None:
    def deep(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x
        for _ in range(5000):
            y = y + 1
        return x, y

    one, other = numbers(deep)

    assert one != other
