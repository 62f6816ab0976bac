"""DTensors become local tensors where the graph says how, and stay where it does not or where gradients are wanted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.torch_version import TorchVersion

from fxfuse.backend.frontend import take
from fxfuse.graph.sharded import local_part
from fxfuse.passes.normalise.shards import localise, placement
from tests.models.blocks import Traced, assert_same, trace
from tests.models.sharded import Decoder, How, decoder, one_process, shard, tokens

pytestmark = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="the graphs that Dynamo makes of DTensors say it in another way"
)

DTENSORS = ("from_local", "redistribute", "to_local")


@pytest.fixture(autouse=True)
def processes() -> Iterator[None]:
    with one_process():
        yield


def traced(how: How, beside: bool = False) -> tuple[Decoder, Traced]:
    model = decoder(2, beside=beside)
    return model, trace(shard(decoder(2, beside=beside), how), tokens(8))


@pytest.mark.parametrize("how", ["dtensor", "whole outputs"])
@pytest.mark.parametrize("beside", [False, True])
def test_all_of_a_model_is_local(how: How, beside: bool) -> None:
    model, graph = traced(how, beside)
    before = graph.linears
    gone = localise(graph.gm.graph)
    graph.gm.recompile()

    assert gone
    assert graph.count(*DTENSORS) == 0
    assert graph.count("all_reduce") == 4
    assert graph.linears == before
    assert graph.count("div") == (4 if beside else 0)  # the biases of what is summed
    weights = graph.gm.graph.find_nodes(op="call_function", target=local_part)
    assert all(placement(source) is not None for node in weights for source in node.all_input_nodes)
    assert_same(graph(), model(tokens(8)))


def test_what_is_read_twice_is_entered_once() -> None:
    _, graph = traced("dtensor")
    localise(graph.gm.graph)
    norms = [node for node in graph.gm.graph.nodes if "rms_norm" in str(node.target)]

    assert [len(node.users) for node in norms] == [3, 2, 3, 2, 1]


def test_what_is_spread_along_the_sequence_stays_a_dtensor() -> None:
    model, graph = traced("sequence")
    localise(graph.gm.graph)
    graph.gm.graph.lint()
    graph.gm.recompile()

    assert graph.count("all_reduce", "local_part") == 0
    assert graph.count("redistribute") > 0
    assert_same(graph(), model(tokens(8)))


def test_what_has_gradients_stays_a_dtensor() -> None:
    found: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        found.append(take(gm, inputs, None).gm)
        return gm.forward

    torch.compile(shard(decoder(1), "dtensor"), backend=backend)(tokens())
    (gm,) = found

    assert localise(gm.graph) == []


def test_a_dtensor_that_another_op_reads_stays_one() -> None:
    _, graph = traced("dtensor")
    first = next(node for node in graph.gm.graph.nodes if node.target == "redistribute")
    with graph.gm.graph.inserting_after(first):
        graph.gm.graph.call_method("full_tensor", (first,))
    localise(graph.gm.graph)

    assert graph.count("redistribute") == graph.count("to_local") == 1
    graph.gm.graph.lint()
