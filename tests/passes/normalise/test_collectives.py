"""An all-reduce and its wait are one op, whoever wrote them, and one that overlaps with other work stays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from fxfuse.graph.sharded import all_reduce
from fxfuse.passes.normalise.collectives import join_waits
from fxfuse.passes.normalise.normal import normalise
from tests.models.blocks import assert_same, trace, vectors
from tests.models.sharded import How, decoder, one_process, shard, tokens


@pytest.fixture(autouse=True)
def processes() -> Iterator[None]:
    with one_process():
        yield


@pytest.mark.parametrize("how", ["functional", "in place"])
def test_each_is_one_op(how: How) -> None:
    model, graph = decoder(2), trace(shard(decoder(2), how), tokens())
    normalise(graph.gm)
    graph.gm.recompile()

    assert len(graph.gm.graph.find_nodes(op="call_function", target=all_reduce)) == 4
    assert graph.count("wait_tensor", "copy_", "as_written") == 0
    assert_same(graph(), model(tokens()))


class Viewed(nn.Module):
    """Another view of what is reduced in place is read later."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        half = y[..., :4]
        dist.all_reduce(y)
        return x + y + half.sum()


class Kept(nn.Module):
    """What is reduced in place is the caller's."""

    def forward(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x + 1


@pytest.mark.parametrize("model", [Viewed(), Kept()], ids=lambda model: type(model).__name__)
def test_a_write_that_others_see_stays(model: nn.Module) -> None:
    graph = trace(model, vectors())
    normalise(graph.gm)

    assert graph.count("copy_") == 1


def test_what_is_computed_meanwhile_stays_there() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    start = graph.call_function(torch.ops._c10d_functional.all_reduce, (x, "sum", "0"))
    other = graph.call_function(torch.relu, (x,))
    wait = graph.call_function(torch.ops._c10d_functional.wait_tensor, (start,))
    graph.output((other, wait))

    assert join_waits(graph) == []
