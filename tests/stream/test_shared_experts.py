"""An FFN beside routed experts is a branch where its output is added like theirs; else the reason says what ties it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxfuse.passes import REPORTS, apply_plan, simplify
from fxfuse.plan import Plan
from fxfuse.stream.branch import Branch
from tests.models.blocks import HIDDEN, WIDTH, Layer, Stream, SwiGLU, on_both_roads, ready, trace, vectors


class Routed(nn.Module):
    """Two of three experts for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.up, self.down = (nn.Parameter(torch.randn(3, *size)) for size in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        weights, index = torch.topk(torch.softmax(self.router(x), -1), 2, -1)
        chosen = torch.einsum("bskf,bskfd->bskd", self.hidden(x, index), self.down[index])
        return (chosen * weights.unsqueeze(-1)).sum(-2)

    def hidden(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.relu(torch.einsum("bsd,bskdf->bskf", x, self.up[index]))


class Mixture(nn.Module):
    """Routed experts and a shared one; ``end`` takes the sum of both and what both read."""

    def __init__(self, end: Callable[[Tensor, Tensor], Tensor] = lambda total, x: total) -> None:
        super().__init__()
        self.routed, self.shared, self.end = Routed(), SwiGLU(), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.routed(x) + self.shared(x), x)


class InFloat32(Mixture):
    """Adds up in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.routed(x).float() + self.shared(x).float()).to(x.dtype)


class GatedNorm(nn.Module):
    """A norm with matrices of its own, which gates what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down, self.up = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x * torch.sigmoid(self.up(torch.relu(self.down(x))))


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


TIED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a norm": (lambda: Mixture(lambda total, x: torch.nn.functional.rms_norm(total, (WIDTH,))), "a norm takes the sum"),
    "a norm by hand": (lambda: Mixture(lambda total, x: rms(total)), "a norm takes the sum of both"),
    "a gate on both": (lambda: Mixture(lambda total, x: total * torch.sigmoid(x)), "multiplied with another value"),
    "a sum in float32 of float64": (InFloat32, "their sum is rounded to float32"),
    "a norm with matrices": (lambda: Layer(Mixture(), GatedNorm()), "both read what one projection made of the stream"),
}


def branches(body: nn.Module, road: str = "dynamo", dtype: torch.dtype = torch.float64) -> tuple[Branch, ...]:
    traced = trace(ready(Stream(body, body)).to(dtype), vectors().to(dtype), road=road)
    simplify(traced.gm)
    return traced.stream.branches


@pytest.mark.parametrize("name", TIED)
@on_both_roads
def test_the_reason_says_what_ties_an_ffn_to_the_experts(name: str, road: str) -> None:
    make, why = TIED[name]

    for found in branches(make(), road):
        assert found.kind == "moe"
        assert found.reason.startswith("routed experts, and an FFN: ") and why in found.reason


@on_both_roads
def test_experts_alone_are_routed_experts(road: str) -> None:
    for body in (Routed(), nn.Sequential(Routed(), nn.RMSNorm(WIDTH))):
        assert [found.reason for found in branches(body, road)] == ["routed experts"] * 2


@on_both_roads
def test_what_is_added_like_the_experts_is_a_branch(road: str) -> None:
    kinds = [found.kind for found in branches(Mixture(), road)]

    assert kinds == ["moe", "gated_ffn"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@on_both_roads
def test_a_sum_in_float32_of_what_is_rounded_to_its_own_dtype_is_opened(road: str, dtype: torch.dtype) -> None:
    found = branches(InFloat32(), road, dtype)

    assert [branch.kind for branch in found] == ["moe", "gated_ffn"] * 2
    assert all(branch.ffn is not None for branch in found if branch.kind == "gated_ffn")


class Two(InFloat32):
    """Two FFNs that are added up in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.routed = SwiGLU()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_opened_is_as_near_to_the_truth_as_the_model(dtype: torch.dtype) -> None:
    model, x = ready(Stream(Two(), Two())).to(dtype), vectors().to(dtype)
    traced = trace(model, x)
    group = [f"layers.{layer}.body.{part}" for layer in range(2) for part in ("routed", "shared")]

    def planned(h: Tensor) -> Tensor:
        h = model.start(h)
        return h + sum(model.branch(layer, h) for layer in range(2))

    apply_plan(traced.gm, Plan(parallel=[group]), names=traced.names)

    (report,) = [each for each in traced.gm.meta[REPORTS] if each.name == "fuse_ffn"]
    assert [set(edit.branches) for edit in report.done] == [set(group)]
    (found,), plain = traced(), planned(x)
    model.double()
    truth = planned(x.double())
    error, own = ((made.double() - truth).norm() for made in (found, plain))
    assert error <= 2 * own + torch.finfo(dtype).eps
