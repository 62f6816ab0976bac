"""Weights of a tensor class of its own are read and never packed: the model stays right, and the reason names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfuse
from fxfuse import Plan
from fxfuse.cpu import onednn
from fxfuse.graph.special import unpackable
from tests.models.blocks import trace


class Quantised(Tensor):
    """Eight-bit rows and a scale each. It knows a linear map, and no ``cat``."""

    @staticmethod
    def __new__(cls, rows: Tensor, scale: Tensor) -> Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype)

    def __init__(self, rows: Tensor, scale: Tensor) -> None:
        self.rows, self.scale = rows, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["rows", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: object) -> Quantised:
        return cls(inner["rows"], inner["scale"])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear and isinstance(args[1], cls):
            product = (args[0] @ args[1].rows.to(args[0].dtype).t()) * args[1].scale
            return product if len(args) < 3 or args[2] is None else product + args[2]
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if function in (aten.detach.default, aten.clone.default, aten.alias.default):
            return cls(function(args[0].rows), function(args[0].scale))
        raise NotImplementedError(f"no {function}")


class Named(Tensor):
    """Nothing but a name for a plain tensor."""


class Own(Tensor):
    """Says itself what functions do."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(function, types, args, kwargs or {})


class FFN(nn.Module):
    def __init__(self, quantised: bool = True) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        for linear in (self.up, self.down) if quantised else ():
            scale = linear.weight.detach().abs().amax(1) / 127
            rows = (linear.weight.detach() / scale[:, None]).round().to(torch.int8)
            linear.weight = nn.Parameter(Quantised(rows, scale), requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(h))))


class Net(nn.Module):
    def __init__(self, quantised: bool = True) -> None:
        super().__init__()
        self.a, self.b = FFN(quantised), FFN()

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.a(h)
        return h + self.b(h)


PLAN = Plan(parallel=[["a", "b"]])
H = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"plan": PLAN},
        {"plan": PLAN, "weights": "share"},
        {"plan": PLAN, "merge_gate_up": True},
        {"plan": PLAN, "kernels": "fxfuse", "merge_gate_up": True},
        {"merge_gate_up": True},
        {"plan": PLAN, "prepack": True},
    ],
    ids=lambda options: "+".join(options) or "no options",
)
@pytest.mark.parametrize("quantised", [True, False])
@torch.no_grad()
def test_the_model_is_what_it_is_under_every_option(
    options: Mapping[str, object], quantised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxfuse.cpu.prepack.prepacked_wins", lambda size: onednn.computes(size.dtype))
    monkeypatch.setattr("fxfuse.cpu.prepack.LEAST", 0)
    model = Net(quantised).requires_grad_(False)
    run = torch.compile(model, backend="ffnfuse", options={"inner": "eager", **options})

    expected = H + model.a(H) + model.b(H) if "plan" in options else model(H)
    torch.testing.assert_close(run(H), expected, rtol=1e-5, atol=1e-5)


def test_they_are_ffns_that_are_not_wide_and_the_reason_names_the_class() -> None:
    explained = fxfuse.explain(Net().requires_grad_(False), H, plan=PLAN)

    assert [(branch.kind, branch.fused) for branch in explained.branches] == [("ffn", ""), ("ffn", "")]
    reason = "its weights are of the tensor class Quantised, and only plain tensors can be packed into one"
    assert [branch.reason for branch in explained.branches] == [reason] * 2


@pytest.mark.parametrize(("cls", "named"), [(Named, ""), (Own, "Own"), (nn.Parameter, "")])
def test_a_class_counts_if_it_says_itself_what_ops_do(cls: type[Tensor], named: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(cls))
    traced = trace(model, H)

    reason = unpackable(traced.gm.graph.find_nodes(op="placeholder"))
    assert (f"class {named}," in reason) if named else reason == ""
