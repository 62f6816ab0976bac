"""Sums of a stream, written anew: the order and the scales of their terms, and the dtype that they had."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxfuse.graph.scale import Scale
from fxfuse.stream.branch import STAMP, Term
from fxfuse.stream.rewrite import add_up
from tests.models.capture import graph_of, node_of


def fill(graph: fx.Graph, **tensors: Tensor) -> None:
    """Leave the values of a tracer."""
    for name, tensor in tensors.items():
        node_of(graph, name).meta["example_value"] = tensor


def test_terms_are_added_from_left_to_right_with_their_scales() -> None:
    graph = graph_of(lambda h, f, g, out: out)
    h, f, g = (node_of(graph, name) for name in "hfg")
    node_of(graph, "out").meta[STAMP] = "a name that is another's"
    with graph.inserting_before(graph.output_node()):
        made = add_up(graph, h, [Term(f), Term(g, Scale(0.5))], node_of(graph, "out"))

    assert made.target is torch.add
    assert made.args[1] is g
    assert made.kwargs == {"alpha": 0.5}
    assert made.args[0].args == (h, f)  # type: ignore[union-attr]
    assert STAMP not in made.meta


def test_a_scale_that_the_graph_computes_is_multiplied_with() -> None:
    graph = graph_of(lambda h, f, s, out: out)
    h, f, s = (node_of(graph, name) for name in "hfs")
    with graph.inserting_before(graph.output_node()):
        made = add_up(graph, h, [Term(f, Scale(2.0, (s,)))], node_of(graph, "out"))
    graph.output_node().args = (made,)

    run = fx.GraphModule(nn.Module(), graph)

    assert run(torch.tensor(1.0), torch.tensor(5.0), 3.0, None) == 31.0


def test_a_sum_without_terms_keeps_the_dtype_that_it_had() -> None:
    graph = graph_of(lambda h, out: out)
    fill(graph, h=torch.zeros(2, dtype=torch.bfloat16), out=torch.zeros(2))
    with graph.inserting_before(graph.output_node()):
        made = add_up(graph, node_of(graph, "h"), [], node_of(graph, "out"))

    assert (made.target, made.args) == ("to", (node_of(graph, "h"), torch.float32))
