"""Surgery on graphs: all or nothing, copies that are whole, and erasing no more than what is dead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from fxfuse.graph.surgery import copy_graph, erase_dead, transaction
from tests.models.blocks import Stream, SwiGLU, assert_same, on_both_roads, ready, trace, vectors
from tests.models.capture import graph_of, node_of


@on_both_roads
def test_a_transaction_that_raises_puts_the_graph_back(road: str) -> None:
    traced = trace(ready(Stream(SwiGLU())), vectors(), road=road)
    code, expected = traced.gm.code, traced()

    def edit_and_fail() -> None:
        with transaction(traced.gm):
            last = traced.gm.graph.output_node()
            with traced.gm.graph.inserting_before(last):
                doubled = traced.gm.graph.call_function(torch.mul, (last.all_input_nodes[0], 2))
            last.replace_input_with(last.all_input_nodes[0], doubled)
            raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        edit_and_fail()

    assert traced.gm.code == code
    assert_same(traced(), expected)
    assert "fxfuse_transaction" not in traced.gm.meta
    assert traced.stream.branches[0].name == "layers.0.body"  # the names that come with the inputs are there again


def test_a_transaction_takes_a_graph_that_is_not_sound_back() -> None:
    traced = trace(ready(Stream(SwiGLU())), vectors())
    code = traced.gm.code

    def break_the_order() -> None:
        with transaction(traced.gm):
            first = next(n for n in traced.gm.graph.nodes if n.op == "call_function")
            traced.gm.graph.output_node().prepend(first)

    with pytest.raises(RuntimeError, match="used before it has been defined"):
        break_the_order()

    assert traced.gm.code == code


def test_an_inner_transaction_leaves_the_outer_one_to_put_things_back() -> None:
    traced = trace(ready(Stream(SwiGLU())), vectors())
    code = traced.gm.code

    def fail_outside() -> None:
        with transaction(traced.gm):
            with transaction(traced.gm), traced.gm.graph.inserting_before(traced.gm.graph.output_node()):
                traced.gm.graph.call_function(torch.ones, (1,))
            raise KeyError

    with pytest.raises(KeyError):
        fail_outside()

    assert traced.gm.code == code


def test_a_transaction_compiles_what_was_edited() -> None:
    traced = trace(ready(Stream(SwiGLU())), vectors())
    (expected,) = traced()

    with transaction(traced.gm):
        last = traced.gm.graph.output_node()
        (out,) = last.all_input_nodes
        with traced.gm.graph.inserting_before(last):
            last.replace_input_with(out, traced.gm.graph.call_function(torch.mul, (out, 2)))

    assert_same(traced(), expected * 2)


def test_a_copy_keeps_where_dynamo_found_the_inputs() -> None:
    traced = trace(ready(Stream(SwiGLU())), vectors())

    copied = copy_graph(traced.gm.graph)

    for old, new in zip(traced.gm.graph.nodes, copied.nodes, strict=True):
        assert new is not old
        assert getattr(new, "_dynamo_source", None) == getattr(old, "_dynamo_source", None)
        assert new.meta.keys() == old.meta.keys()


def names(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def test_erasing_takes_what_only_the_dead_needed() -> None:
    graph = graph_of(lambda x, y: (x.sin().cos() + y.tan(), x.sin(), y.tan().exp()))
    (dead, kept, _) = graph.output_node().args[0]
    graph.output_node().args = ((kept,),)

    erased = erase_dead(graph, [dead])

    assert {n.name for n in erased} == {"add", "cos", "sin", "tan"}
    assert names(graph) == ["x", "y", "sin_1", "tan_1", "exp", "output"]


def test_erasing_stops_at_what_is_kept_and_at_what_others_read() -> None:
    graph = graph_of(lambda x: (x.sin().cos().exp(), x.sin()))
    graph.output_node().args = ((node_of(graph, "sin_1"),),)

    erased = erase_dead(graph, [node_of(graph, "exp"), node_of(graph, "sin_1")], keep={node_of(graph, "cos")})

    assert [n.name for n in erased] == ["exp"]


def test_erasing_keeps_a_write_that_others_see_and_takes_one_that_nobody_does() -> None:
    def f(x: Tensor, cache: Tensor) -> Tensor:
        own = (x * 3).mul_(2)
        seen = cache.copy_(torch.cos(x))
        return own + seen

    graph = graph_of(f)
    (dead,) = graph.output_node().all_input_nodes
    graph.output_node().args = (node_of(graph, "x"),)

    erase_dead(graph, [dead])

    assert names(graph) == ["x", "cache", "cos", "copy_", "output"]
