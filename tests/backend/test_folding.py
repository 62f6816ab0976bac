"""Folded gains change nothing that a model computes, and leave the FFNs of a group one value to read; or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfuse
from fxfuse import Plan, PlanError
from tests.models.bodies import SwiGLU
from tests.models.tiny import redraw, vectors

PLAN = Plan(parallel=[["layers.0.mlp", "layers.1.mlp"]])
X = vectors(2, 3, 8)


class OnePlus(nn.Module):
    """Gemma's norm: a gain of one more than its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, h: Tensor) -> Tensor:
        return F.rms_norm(h, (h.shape[-1],), eps=1e-6) * (1 + self.weight)


class Layer(nn.Module):
    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mlp(self.norm(h))


class TwoReaders(Layer):
    """Its norm is read by a gate on the output too."""

    def forward(self, h: Tensor) -> Tensor:
        normed = self.norm(h)
        return h + self.mlp(normed) * normed.sigmoid()


class Net(nn.Module):
    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.double().eval().requires_grad_(False)
        redraw(self)

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return h


def rms() -> nn.Module:
    return nn.RMSNorm(8, eps=1e-6)


def net(norm: Callable[[], nn.Module] = rms, kind: type[Layer] = Layer) -> Any:
    return Net(*(kind(norm(), SwiGLU(12)) for _ in range(3)))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: held.clone() for name, held in model.state_dict().items()}


@pytest.mark.parametrize(("norm", "ones"), [(rms, 1.0), (lambda: OnePlus(8), 0.0)], ids=["gain", "one plus"])
def test_the_model_computes_what_it_did(norm: Callable[[], nn.Module], ones: float) -> None:
    model = net(norm)
    expected, gate, gain = model(X), model.layers[1].mlp.gate.weight.clone(), model.layers[1].norm.weight.clone()
    last = state(model.layers[2])

    assert fxfuse.fold_gains(model, PLAN, X) == ("layers.0.mlp", "layers.1.mlp")
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.layers[1].mlp.gate.weight, gate * (gain + 1.0 - ones), rtol=1e-12, atol=1e-12)
    assert model.layers[0].norm.weight is model.layers[1].norm.weight
    assert (model.layers[0].norm.weight == ones).all()
    assert all(torch.equal(held, last[name]) for name, held in model.layers[2].state_dict().items())


def test_a_second_time_changes_nothing() -> None:
    model = net()
    fxfuse.fold_gains(model, PLAN, X)
    before = state(model)

    fxfuse.fold_gains(model, PLAN, X)
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())


def test_members_that_share_a_gain_each_have_it_folded() -> None:
    model = net()
    model.layers[1].norm = model.layers[0].norm
    expected = model(X)

    fxfuse.fold_gains(model, PLAN, X)
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


def test_a_gain_that_another_layer_reads_is_refused() -> None:
    model = net()
    model.layers[2].norm = model.layers[1].norm

    with pytest.raises(PlanError, match="the gain of 'layers.1.mlp' cannot be folded: its norm's gain also serves"):
        fxfuse.fold_gains(model, PLAN, X)


def _biased() -> Any:
    return net(lambda: nn.LayerNorm(8))


def _shared_weight() -> Any:
    model = net()
    model.layers[2].mlp.up.weight = model.layers[1].mlp.up.weight
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_biased, "its norm does not end with one gain and nothing else"),
        (lambda: net(kind=TwoReaders), "another value is computed from what its norm makes"),
        (_shared_weight, "its weights also serve another value"),
    ],
)
def test_what_would_not_be_exact_is_refused_and_leaves_the_model_alone(make: Callable[[], Any], reason: str) -> None:
    model = make()
    before = state(model)

    with pytest.raises(PlanError, match=reason):
        fxfuse.fold_gains(model, PLAN, X)
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())


def test_an_unknown_name_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"'layers.0.mpl' is no branch of this model.*layers.0.mlp"):
        fxfuse.fold_gains(net(), Plan(parallel=[["layers.0.mpl", "layers.1.mlp"]]), X)


def test_a_plan_without_groups_folds_nothing() -> None:
    model = net()
    before = state(model)

    assert fxfuse.fold_gains(model, Plan(drop=["layers.0.mlp"]), X) == ()
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())
