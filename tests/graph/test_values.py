"""What a traced graph knows of its values, and which of them are weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse.graph.constant import weight_only
from fxfuse.graph.ops import op
from fxfuse.graph.values import clean, dtype, is_floating, parameters, same_shape, shape, value
from tests.models.blocks import HIDDEN, WIDTH, Decoder, Stream, SwiGLU, on_every_road, ready, trace, vectors


def named(gm: fx.GraphModule, name: str) -> fx.Node:
    (found,) = [node for node in gm.graph.nodes if node.name == name]
    return found


def first(gm: fx.GraphModule, name: str) -> fx.Node:
    """The first node that is ``name`` in the vocabulary."""
    return next(node for node in gm.graph.nodes if (found := op(node)) is not None and found.name == name)


@on_every_road
def test_shapes_and_dtypes_are_known_on_every_road(road: str) -> None:
    traced = trace(ready(Stream(SwiGLU())), vectors(), road=road)

    gate = first(traced.gm, "linear")

    assert shape(gate) == (2, 3, HIDDEN)
    assert dtype(gate) is torch.float64
    assert is_floating(gate)
    weight = op(gate).node("weight")  # type: ignore[union-attr]
    assert shape(weight) == (HIDDEN, WIDTH)
    assert value(traced.gm.graph.output_node()) is None


@on_every_road
def test_weights_have_the_names_that_the_model_gives_them(road: str) -> None:
    model = ready(Decoder())
    traced = trace(model, vectors(), road=road)

    found = parameters(traced.gm, traced.names)

    assert sorted(found.values()) == sorted(name for name, _ in model.named_parameters())


@on_every_road
def test_a_buffer_is_a_weight_too_and_an_input_is_none(road: str) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.register_buffer("table", torch.ones(8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.inner.table

    traced = trace(Table(), vectors(), road=road)

    assert list(parameters(traced.gm, traced.names).values()) == ["inner.table"]


def test_who_knows_the_root_module_overrules_the_graph() -> None:
    traced = trace(ready(Stream(SwiGLU())), vectors(), road="export")
    node = first(traced.gm, "linear").args[1]

    found = parameters(traced.gm, {node: "_orig_mod.model.gate.weight"})

    assert found[node] == "model.gate.weight"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.mlp.weight", "layers.0.mlp.weight"),
        ("_orig_mod.layers.0.mlp.weight", "layers.0.mlp.weight"),
        ("layers._orig_mod.0.mlp.weight", "layers.0.mlp.weight"),
        ("layers.0._checkpoint_wrapped_module.mlp.weight", "layers.0.mlp.weight"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.mlp.weight", "layers.0.mlp.weight"),
        ("base_model.model.layers.0.mlp.weight", "layers.0.mlp.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_a_name_is_free_of_what_wrappers_add(name: str, expected: str) -> None:
    assert clean(name) == expected


def test_sizes_are_compared_as_expressions() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x + 1, x * 2, torch.cat((x, x)), y + 1, x.transpose(0, 1)

    gm = make_fx(f, tracing_mode="symbolic")(torch.randn(4, 6), torch.randn(5, 6))
    one, two, double, other, turned = gm.graph.output_node().args[0]

    assert same_shape(one, two)
    assert not same_shape(one, double)
    assert not same_shape(one, other)
    assert not same_shape(one, turned)


def test_a_graph_without_recorded_sizes_is_given_the_benefit_of_the_doubt() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")

    assert value(x) is None
    assert shape(x) is None
    assert same_shape(x, y)
    assert is_floating(x)


class Expressions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))
        self.register_buffer("gain", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.weight.t() * 2
        return (x @ matrix) * (1 + self.gain)


@on_every_road
def test_what_is_made_of_weights_alone_is_weight_only(road: str) -> None:
    traced = trace(Expressions().double(), vectors(), road=road)
    gm = traced.gm

    constant = weight_only(gm, parameters(gm, traced.names))

    product = first(gm, "matmul")
    assert product.args[1] in constant
    assert product not in constant
    assert first(gm, "add") in constant
    assert not any(node in constant for node in gm.graph.nodes if node.op == "output" or node is product.args[0])


@on_every_road
def test_what_a_graph_makes_of_a_buffer_by_writing_is_not_weight_only(road: str) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gain", torch.ones(8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain.mul_(0.5)

    traced = trace(Counting(), vectors(), road=road)
    gm = traced.gm

    constant = weight_only(gm, parameters(gm, traced.names))

    assert all(node.op in ("placeholder", "get_attr") for node in constant)
