"""What passes share: all or nothing, sums that keep their dtype, and erasing no more than what is dead."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx, nn

from fxfuse.graph.scale import Scale
from fxfuse.graph.surgery import copy_graph, erase_dead, transaction
from fxfuse.passes import Edit, PassReport
from fxfuse.stream.branch import STAMP, Term
from fxfuse.stream.rewrite import add_up
from tests.models.blocks import Stream, SwiGLU, assert_same, on_both_roads, ready, trace, vectors


def names(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def node(graph: fx.Graph, name: str) -> fx.Node:
    (found,) = [n for n in graph.nodes if n.name == name]
    return found


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


def graph_of(f: object) -> fx.Graph:
    return fx.Tracer().trace(f)  # type: ignore[arg-type]


def fill(graph: fx.Graph, **tensors: Tensor) -> None:
    """Leave the values of a tracer."""
    for name, tensor in tensors.items():
        node(graph, name).meta["example_value"] = tensor


def test_terms_are_added_from_left_to_right_with_their_scales() -> None:
    graph = graph_of(lambda h, f, g, out: out)
    h, f, g = (node(graph, name) for name in "hfg")
    node(graph, "out").meta[STAMP] = "a name that is another's"
    with graph.inserting_before(graph.output_node()):
        made = add_up(graph, h, [Term(f), Term(g, Scale(0.5))], node(graph, "out"))

    assert made.target is torch.add
    assert made.args[1] is g
    assert made.kwargs == {"alpha": 0.5}
    assert made.args[0].args == (h, f)  # type: ignore[union-attr]
    assert STAMP not in made.meta


def test_a_scale_that_the_graph_computes_is_multiplied_with() -> None:
    graph = graph_of(lambda h, f, s, out: out)
    h, f, s = (node(graph, name) for name in "hfs")
    with graph.inserting_before(graph.output_node()):
        made = add_up(graph, h, [Term(f, Scale(2.0, (s,)))], node(graph, "out"))
    graph.output_node().args = (made,)

    run = fx.GraphModule(nn.Module(), graph)

    assert run(torch.tensor(1.0), torch.tensor(5.0), 3.0, None) == 31.0


def test_a_sum_without_terms_keeps_the_dtype_that_it_had() -> None:
    graph = graph_of(lambda h, out: out)
    fill(graph, h=torch.zeros(2, dtype=torch.bfloat16), out=torch.zeros(2))
    with graph.inserting_before(graph.output_node()):
        made = add_up(graph, node(graph, "h"), [], node(graph, "out"))

    assert (made.target, made.args) == ("to", (node(graph, "h"), torch.float32))


def test_erasing_takes_what_only_the_dead_needed() -> None:
    graph = graph_of(lambda x, y: (x.sin().cos() + y.tan(), x.sin(), y.tan().exp()))
    (dead, kept, _) = graph.output_node().args[0]
    graph.output_node().args = ((kept,),)

    erased = erase_dead(graph, [dead])

    assert {n.name for n in erased} == {"add", "cos", "sin", "tan"}
    assert names(graph) == ["x", "y", "sin_1", "tan_1", "exp", "output"]


def test_erasing_stops_at_what_is_kept_and_at_what_others_read() -> None:
    graph = graph_of(lambda x: (x.sin().cos().exp(), x.sin()))
    graph.output_node().args = ((node(graph, "sin_1"),),)

    erased = erase_dead(graph, [node(graph, "exp"), node(graph, "sin_1")], keep={node(graph, "cos")})

    assert [n.name for n in erased] == ["exp"]


def test_erasing_keeps_a_write_that_others_see_and_takes_one_that_nobody_does() -> None:
    def f(x: Tensor, cache: Tensor) -> Tensor:
        own = (x * 3).mul_(2)
        seen = cache.copy_(torch.cos(x))
        return own + seen

    graph = graph_of(f)
    (dead,) = graph.output_node().all_input_nodes
    graph.output_node().args = (node(graph, "x"),)

    erase_dead(graph, [dead])

    assert names(graph) == ["x", "cache", "cos", "copy_", "output"]


def test_a_report_is_true_if_something_was_done_and_reads_like_a_list() -> None:
    report = PassReport("drop")
    assert not report
    report.refused.append(Edit(("a", "b"), "fuse", "they differ"))
    assert not report
    report.done.append(Edit(("c",), "dropped"))
    assert report
    assert str(report) == "drop: 1 done, 1 refused\n  dropped c\n  refused: fuse a + b: they differ"
    assert operator.eq(report.done, [Edit(("c",), "dropped", "")])
