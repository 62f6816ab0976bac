from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxfuse
from fxfuse.backend.frontend import Captured, capture, take
from fxfuse.model.force import uncompiled
from tests.models.tiny import llama, tokens


@pytest.mark.parametrize(
    "look",
    [lambda model, batch: capture(model, **batch), lambda model, batch: fxfuse.record(model, [batch])],
    ids=["capture", "record"],
)
def test_a_model_that_was_looked_at_is_freed_like_any_other(look: Callable[[Any, dict[str, Any]], object]) -> None:
    model = llama(1)
    gone = [weakref.ref(model), weakref.ref(model.lm_head.weight)]
    look(model, {"input_ids": tokens(1, 5), "use_cache": False})
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_an_uncompiled_model_is_afterwards_what_it_was() -> None:
    model = llama(1)
    before = dict(vars(model))
    with uncompiled(model):
        assert model._compiled_call_impl is None
    assert vars(model) == before

    model.compile(backend="eager")
    before = dict(vars(model))
    with uncompiled(model):
        assert model._compiled_call_impl is None
    assert vars(model) == before


class Scaled(nn.Module):
    """Holds floats, of which one layer's differs from the other's, and takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))
        for number, layer in enumerate(self.layers):
            layer.scale = 0.5 + number

    def forward(self, h: Tensor, factor: float) -> Tensor:
        for layer in self.layers:
            h = h + layer(h) * layer.scale
        return h * factor


def _symbols(gm: fx.GraphModule) -> list[str]:
    """The nodes that compute a float which is no number when the graph is made."""
    floats = [node for node in gm.graph.nodes if isinstance(node.meta.get("example_value"), torch.SymFloat)]
    return [str(node.target) for node in floats if node.op != "placeholder"]


def test_a_graph_that_is_taken_holds_the_floats_of_modules_as_numbers() -> None:
    model, h = Scaled(), torch.randn(3, 8, dtype=torch.float64)
    found: list[Captured] = []
    before: list[int] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        before.append(len(_symbols(gm)))
        found.append(take(gm, inputs, model))
        return found[-1].gm

    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, dynamic=True)
        torch.testing.assert_close(compiled(h, 1.5), model(h, 1.5), rtol=0, atol=1e-8)
        assert (before, len(_symbols(found[0].gm))) == ([3], 1)  # that of the argument is left
        assert set(found[0].names.values()) == {name for name, _ in model.named_parameters()}

        model.layers[1].scale = 0.25
        torch.testing.assert_close(compiled(h, 2.5), model(h, 2.5), rtol=0, atol=1e-8)
        assert len(found) == 2  # each number has its guard


def test_a_captured_graph_holds_floats_as_numbers_though_they_change_between_captures() -> None:
    model, h = Scaled(), torch.randn(3, 8, dtype=torch.float64)
    for scale in (0.25, 0.75, 1.25):
        model.layers[0].scale = scale
        (captured,) = capture(model, h, scale)
        assert _symbols(captured.gm) == []
        torch.testing.assert_close(captured.gm(*captured.inputs)[0], model(h, scale), rtol=0, atol=1e-8)


def test_a_copy_of_a_captured_graph_has_names_of_its_own_and_leaves_the_original_alone() -> None:
    model, h = Scaled(), torch.randn(3, 8, dtype=torch.float64)
    (captured,) = capture(model, h, 2.0)
    copied = captured.copy()
    assert list(copied.names.values()) == list(captured.names.values())
    assert all(node.graph is copied.gm.graph for node in copied.names)

    output = copied.gm.graph.output_node()
    output.args = (tuple(copied.gm.graph.find_nodes(op="placeholder"))[:1],)
    copied.gm.recompile()
    torch.testing.assert_close(captured.gm(*captured.inputs)[0], model(h, 2.0), rtol=0, atol=1e-8)
