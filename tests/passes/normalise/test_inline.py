"""A call of one of torch.nn's modules becomes the function that it is; all others stay calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxfuse.graph.ops import op
from fxfuse.passes import simplify
from fxfuse.passes.normalise.inline import inline
from tests.models.blocks import WIDTH, assert_same, flat_tensors, ready, vectors

KNOWN: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, 3),
    "linear without bias": lambda: nn.Linear(WIDTH, 3, bias=False),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "rms_norm": lambda: nn.RMSNorm(WIDTH, eps=1e-5),
    "dropout": lambda: nn.Dropout(0.1),
    "silu": nn.SiLU,
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "elu": lambda: nn.ELU(alpha=0.5),
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.5),
    "softplus": lambda: nn.Softplus(beta=2.0),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "glu": nn.GLU,
    "softmax": lambda: nn.Softmax(-1),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_module_of_torch_nn_becomes_its_function(name: str) -> None:
    model = ready(nn.Sequential(KNOWN[name]()))
    gm = fx.symbolic_trace(model)

    assert inline(gm) == ["0"]
    gm.recompile()

    with torch.no_grad():
        assert_same(flat_tensors(gm(vectors())), model(vectors()))
    spoken = [found.name for node in gm.graph.nodes if (found := op(node)) is not None]
    assert spoken == [name.split()[0]]


def test_a_module_that_does_nothing_is_gone() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Identity(), nn.Identity()))

    assert len(inline(gm)) == 2

    assert [node.op for node in gm.graph.nodes] == ["placeholder", "output"]


def test_an_embedding_becomes_a_look_up() -> None:
    model = nn.Sequential(nn.Embedding(5, WIDTH))
    gm = fx.symbolic_trace(model)
    inline(gm)
    gm.recompile()

    ids = torch.arange(5)
    assert_same(flat_tensors(gm(ids)), model(ids))


class Doubled(nn.Linear):
    """No longer what its base class is."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    module = nn.Linear(WIDTH, WIDTH)
    module.register_forward_hook(lambda module, inputs, output: output + 1)
    return module


def patched() -> nn.Module:
    module = nn.Linear(WIDTH, WIDTH)
    module.forward = lambda x: x * 3  # type: ignore[method-assign]  # as libraries do that offload weights
    return module


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a batch norm": lambda: nn.BatchNorm1d(3),
    "hooks": hooked,
    "a forward of its own": patched,
    "a parametrized weight": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "a class derived from one": lambda: Doubled(WIDTH, WIDTH),
}


class Opaque(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.Sequential)


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_more_than_its_class_stays_a_call(name: str) -> None:
    model = ready(nn.Sequential(OTHERS[name](), nn.Tanh()))
    gm = fx.GraphModule(model, Opaque().trace(model))

    assert inline(gm) == ["1"]
    gm.recompile()

    assert [node.target for node in gm.graph.nodes if node.op == "call_module"] == ["0"]
    with torch.no_grad():
        assert_same(flat_tensors(gm(vectors())), model(vectors()))


def test_arguments_by_keyword_and_what_is_known_of_the_value_are_kept() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=x)

    model = ready(Keyword())
    gm = fx.symbolic_trace(model)
    (call,) = gm.graph.find_nodes(op="call_module")
    call.meta["mark"] = "known"

    report = simplify(gm)

    assert [str(edit) for edit in report.done] == ["inlined norm"]
    (made,) = [node for node in gm.graph.nodes if "mark" in node.meta]
    assert op(made) is not None
    with torch.no_grad():
        assert_same(flat_tensors(gm(vectors())), model(vectors()))


def test_a_module_in_training_stays_one_in_training() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Dropout(0.5)).train())
    inline(gm)
    gm.recompile()

    assert (gm(torch.ones(1000)) == 0).any()
