"""A graph can be sorted anew without a read passing a write, or anything passing the border of an autocast region."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxfuse.graph.order import Stuck, hazards, overwritten, regions, rewrites, sort, writes_in_vain, written_memory
from tests.models.blocks import trace, vectors
from tests.models.capture import graph_of, node_of


def names(graph: fx.Graph) -> list[str]:
    return [n.name for n in graph.nodes]


def resort(graph: fx.Graph) -> None:
    sort(graph, hazards(graph), regions(graph))
    graph.lint()


def test_a_graph_in_order_stays_as_it_is() -> None:
    graph = graph_of(lambda x, y: (x.sin() + y.cos()) * x)
    before = names(graph)

    resort(graph)

    assert names(graph) == before


def test_a_node_is_moved_behind_what_it_reads_and_nothing_else_moves() -> None:
    graph = graph_of(lambda x: (x.sin(), x.cos(), x.exp()))
    node_of(graph, "sin").replace_input_with(node_of(graph, "x"), node_of(graph, "exp"))

    resort(graph)

    assert names(graph) == ["x", "cos", "exp", "sin", "output"]


def test_a_cycle_is_reported_with_the_nodes_that_wait() -> None:
    graph = graph_of(lambda x: (x.sin().cos().exp(), x.tanh()))
    hazard, region = hazards(graph), regions(graph)
    node_of(graph, "sin").replace_input_with(node_of(graph, "x"), node_of(graph, "exp"))

    with pytest.raises(Stuck) as caught:
        sort(graph, hazard, region)

    assert caught.value.first is node_of(graph, "sin")
    assert {n.name for n in caught.value.nodes} == {"sin", "cos", "exp", "output"}


def test_a_read_stays_between_the_writes_that_it_stood_between() -> None:
    def f(cache: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        before = cache.sin()
        cache.copy_(x)
        between = cache.cos()
        cache.add_(1)
        return before, between

    graph = graph_of(f)
    hazard, region = hazards(graph), regions(graph)
    output = graph.output_node()
    for late in ("sin", "copy_", "cos"):  # as a rewrite that is careless about memory would leave it
        output.prepend(node_of(graph, late))

    sort(graph, hazard, region)

    assert names(graph) == ["cache", "x", "sin", "copy_", "cos", "add_", "output"]


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "view": lambda x: x.view(-1),
    "transpose": lambda x: x.transpose(0, 1),
    "slice": lambda x: x[0],
    "narrow": lambda x: torch.narrow(x, 0, 0, 1),
    "chunk": lambda x: x.chunk(2)[0],
    "a view of a view": lambda x: x.view(-1).unsqueeze(0),
    "an attribute": lambda x: x.mT,
    "a view that no table knows": lambda x: torch.movedim(x, 0, 1),
    "a method that no table knows": lambda x: x.diagonal(),
    "idle dropout": lambda x: torch.nn.functional.dropout(x, 0.1, False),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_through_a_view_is_a_write_to_the_whole(name: str) -> None:
    view = VIEWS[name]
    graph = graph_of(lambda x: (view(x).add_(1), x.sin()))

    memory = written_memory(graph)

    assert node_of(graph, "x") in memory
    assert node_of(graph, "add_") in hazards(graph)[node_of(graph, "sin")]


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "a sum": lambda x: x + 1,
    "clone": lambda x: x.clone(),
    "a product": lambda x: x @ x,
    "norm": lambda x: torch.nn.functional.layer_norm(x, (8,)),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_write_to_a_copy_is_no_write_to_the_original(name: str) -> None:
    copy = COPIES[name]
    graph = graph_of(lambda x: (copy(x).add_(1), x.sin()))

    assert node_of(graph, "x") not in written_memory(graph)
    assert not hazards(graph).get(node_of(graph, "sin"))


def test_a_cast_shares_memory_only_if_it_casts_nothing() -> None:
    class Casting(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.to(torch.float64).add_(1), x.to(torch.float32).mul_(2)

    for found, shared in ((vectors(), "add_"), (vectors().float(), "mul_")):
        graph = trace(Casting(), found).gm.graph
        (source,) = [n for n in graph.nodes if n.op == "placeholder"]
        writer = next(n for n in graph.nodes if n.target == shared)
        assert source in written_memory(graph)
        assert writer in written_memory(graph)


def test_an_op_with_a_schema_is_taken_by_its_word() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        fresh, view = torch.ops.aten.cumsum.default(x, 0), torch.ops.aten.diagonal.default(x)
        return torch.ops.aten.add_.Tensor(fresh, 1), torch.ops.aten.add_.Tensor(view, 1)

    memory = written_memory(graph_of(f))

    assert {n.name for n in memory} == {"cumsum_default", "add__tensor", "x", "diagonal_default", "add__tensor_1"}
    assert len(set(memory.values())) == 2


def test_a_graph_without_writes_has_no_hazards() -> None:
    graph = graph_of(lambda x: x.view(-1).sin() + x[0])

    assert not hazards(graph)
    assert not written_memory(graph)
    assert not overwritten(graph)


def test_what_is_written_after_it_was_made_is_overwritten() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        h = x * 2
        view = h.view(-1)
        other = h + 1
        last = h.mul_(3)
        return view, other, last

    graph = graph_of(f)

    assert {n.name for n in overwritten(graph)} == {"mul", "view"}


REWRITES: dict[str, tuple[Callable[..., object], str | None]] = {
    "add_": (lambda x, y: x.add_(y), "x"),
    "iadd": (lambda x, y: operator.iadd(x, y), "x"),
    "copy_": (lambda x, y: x.copy_(y), "x"),
    "relu_": (lambda x, y: torch.relu_(x), "x"),
    "out=": (lambda x, y: torch.add(x, x, out=y), "y"),
    "aten": (lambda x, y: torch.ops.aten.add_.Tensor(x, y), "x"),
    "no write": (lambda x, y: x + y, None),
}


@pytest.mark.parametrize("name", REWRITES)
def test_a_write_that_returns_what_it_wrote_is_known(name: str) -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> object:
            return REWRITES[name][0](x * 1.0, y * 1.0)

    graph = trace(Writing(), vectors(), vectors(seed=2)).gm.graph
    last = graph.output_node().all_input_nodes[0]

    found = rewrites(last)

    if REWRITES[name][1] is None:
        assert found is None
    else:
        products = [n for n in graph.nodes if n.target is operator.mul]
        assert found is products["xy".index(str(REWRITES[name][1]))]


def test_an_assignment_to_a_part_returns_nothing() -> None:
    class Assigning(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1.0
            y[0] = 2.0
            return y

    graph = trace(Assigning(), vectors()).gm.graph

    assert [rewrites(n) for n in graph.nodes if n.target is operator.setitem] == [None]


def test_a_write_to_memory_of_its_own_is_told_from_one_that_others_see() -> None:
    def f(x: Tensor, cache: Tensor) -> Tensor:
        own = (x * 2).mul_(3)
        seen = x + 1
        seen.mul_(4)
        cache.copy_(x)
        part = (x + 2).view(-1)
        part.neg_()
        return own + seen

    graph = graph_of(f)

    found = {n.name for n in graph.nodes if n.op == "call_method" and n.name.endswith(("_", "_1", "_2"))}
    private = {n.name for n in graph.nodes if n.name in found and writes_in_vain(n)}
    assert found == {"mul_", "mul__1", "copy_", "neg_"}
    assert private == {"mul_", "neg_"}


class Bordered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a = torch.sin(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            b = torch.cos(a)
        return torch.exp(b)


def test_nothing_is_sorted_across_the_border_of_an_autocast_region() -> None:
    graph = trace(Bordered(), vectors().float()).gm.graph
    by_function = {n.target: n for n in graph.nodes}
    a, b, c = (by_function[function] for function in (torch.sin, torch.cos, torch.exp))
    region = regions(graph)
    assert region[a] < region[b] < region[c]
    hazard = hazards(graph)
    a.replace_input_with(a.args[0], b)
    b.replace_input_with(a, b.graph.find_nodes(op="placeholder")[0])
    graph.output_node().prepend(a)
    c.replace_input_with(b, a)

    with pytest.raises(Stuck, match="border of an autocast"):
        sort(graph, hazard, region)
