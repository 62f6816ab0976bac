"""What tracers and authors write in words of their own is said in the vocabulary's, and stays what it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fxfuse.graph.ops import op
from fxfuse.graph.values import shape
from fxfuse.passes.normalise.dialect import translate
from tests.models.blocks import WIDTH, assert_same, flat_tensors, on_both_roads, ready, trace, vectors


class Function(nn.Module):
    """A function of an input and two matrices."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.out_in, self.in_out = nn.Parameter(torch.empty(5, WIDTH)), nn.Parameter(torch.empty(WIDTH, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.out_in, self.in_out)


einsum = torch.einsum
TRANSLATED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], list[str]]] = {
    "glu": (lambda x, w, v: F.glu(x), ["chunk", "getitem", "getitem", "sigmoid", "mul"]),
    "glu of the last dimension": (lambda x, w, v: F.glu(x, dim=2), ["chunk", "getitem", "getitem", "sigmoid", "mul"]),
    "einsum of [out, in]": (lambda x, w, v: einsum("bsd,fd->bsf", x, w), ["linear"]),
    "einsum of [in, out]": (lambda x, w, v: einsum("bsd,df->bsf", x, v), ["matmul"]),
    "einsum with the matrix first": (lambda x, w, v: einsum("fd, bsd -> bsf", w, x), ["linear"]),
    "einsum with dots": (lambda x, w, v: einsum("...d,fd->...f", x, w), ["linear"]),
    "sum of a stack": (lambda x, w, v: torch.stack([x, torch.tanh(x), x]).sum(0), ["tanh", "add", "add"]),
    "sum of a stack on the last dimension": (lambda x, w, v: torch.stack([x, x], dim=3).sum(-1), ["add"]),
    "einsum of two matrices": (lambda x, w, v: einsum("bd,fd->bf", x[0], w), ["getitem", "linear"]),
}

KEPT: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "glu of tokens": lambda x, w, v: F.glu(x[:, :2], dim=1),
    "over the tokens": lambda x, w, v: einsum("bsd,ts->btd", x, torch.eye(3).to(x)),
    "transposed": lambda x, w, v: einsum("bsd,fd->sbf", x, w),
    "transposed at the end": lambda x, w, v: einsum("bsd,fd->bfs", x, w),
    "summed": lambda x, w, v: einsum("bsd,fd->bf", x, w),
    "outer": lambda x, w, v: einsum("bsd,fe->bsde", x, w),
    "attention scores": lambda x, w, v: einsum("bsd,btd->bst", x, x),
    "a diagonal": lambda x, w, v: einsum("bsd,dd->bsd", x, torch.ones(WIDTH, WIDTH).to(x)),
    "a gain": lambda x, w, v: einsum("bsd,d->bsd", x, w[0]),
    "three operands": lambda x, w, v: einsum("bsd,fd,df->bsf", x, w, v),
    "sum of a stack over tokens": lambda x, w, v: torch.stack([x, x]).sum(2),
    "sum of a stack that stays one": lambda x, w, v: torch.stack([x, x]).sum(0, keepdim=True),
    "sum of a stack in another dtype": lambda x, w, v: torch.stack([x, x]).sum(0, dtype=torch.float32),
    "sum of many in half precision": lambda x, w, v: torch.stack([x.half()] * 3).sum(0),
    "sum of a cat": lambda x, w, v: torch.cat([x, x]).sum(0),
    "mean of a stack": lambda x, w, v: torch.stack([x, x]).mean(0),
    "no arrow": lambda x, w, v: einsum("bsd,fd", x, w),
}


@on_both_roads
@pytest.mark.parametrize("name", TRANSLATED)
def test_it_is_said_in_words_of_the_vocabulary(name: str, road: str) -> None:
    function, words = TRANSLATED[name]
    model = ready(Function(function))
    traced = trace(model, vectors(), road=road)
    before = shape(traced.gm.graph.output_node().all_input_nodes[0])

    gone = translate(traced.gm.graph)
    traced.gm.recompile()

    assert len(gone) == 1
    spoken = [found.name for node in traced.gm.graph.nodes if (found := op(node)) is not None]
    assert [name for name in spoken if name not in ("select", "slice")] == [
        name for name in words if road == "dynamo" or words[0] != "getitem" or name != "getitem"
    ]
    assert shape(traced.gm.graph.output_node().all_input_nodes[0]) == before
    with torch.no_grad():
        assert_same(traced(), model(vectors()))


@on_both_roads
def test_what_only_looks_alike_stays(road: str) -> None:
    for name, function in KEPT.items():
        traced = trace(ready(Function(function)), vectors(), road=road)
        before = [node.target for node in traced.gm.graph.nodes if node.op == "call_function"]

        assert translate(traced.gm.graph) == [], name
        after = [node.target for node in traced.gm.graph.nodes if node.op == "call_function"]
        assert after == before or road == "export", name


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_stack_in_the_words_of_decompositions(dim: int) -> None:
    model = ready(Function(lambda x, w, v: torch.stack([x, torch.tanh(x)], dim).sum(dim)))
    gm = torch.export.export(model, (vectors(),)).run_decompositions().module()
    assert isinstance(gm, torch.fx.GraphModule)

    assert len(translate(gm.graph)) == 1
    gm.recompile()

    assert [found.name for node in gm.graph.nodes if (found := op(node)) is not None] == ["tanh", "add"]
    with torch.no_grad():
        assert_same(flat_tensors(gm(vectors())), model(vectors()))


@pytest.mark.parametrize("norm", [nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False)], ids=["", "bare"])
def test_a_norm_of_several_results_becomes_one_of_one(norm: nn.Module) -> None:
    model = ready(norm)
    with torch.no_grad():
        gm = make_fx(model)(vectors())

    assert len(translate(gm.graph)) == 1
    gm.recompile()

    assert [found.name for node in gm.graph.nodes if (found := op(node)) is not None] == ["layer_norm"]
    with torch.no_grad():
        assert_same(flat_tensors(gm(vectors())), model(vectors()))


def test_a_norm_whose_statistics_are_read_stays() -> None:
    native = torch.ops.aten.native_layer_norm.default

    gm = make_fx(lambda x: native(x, [WIDTH], None, None, 1e-5)[:2])(vectors())

    assert translate(gm.graph) == []
    assert gm.graph.find_nodes(op="call_function", target=native)
