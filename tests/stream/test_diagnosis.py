from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxfuse.backend.frontend import capture
from fxfuse.stream.diagnosis import Census, census
from tests.models.tiny import Tower, vectors


class Net(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        match self.form:
            case "pointwise":
                return torch.tanh(x) + x
            case "plain":
                return self.two(torch.tanh(self.one(x)))
            case "two towers":
                return self.one(x[:, :4].repeat(1, 2)) + self.two(x[:, 4:].repeat(1, 2))
            case "scaled by numbers":
                x = self.one(x) * 0.7 + x * 0.9
                return self.two(x) + 0.8 * x
            case "scaled by weights":
                x = self.one(x) + self.two.bias * x
                return x * self.one.bias + self.two(x)
            case "scaled after a shift":
                x = (x + self.two.bias) * self.one.bias + self.one(x)
                return self.two(x) + ((x + self.one.bias) * self.two.bias).to(x.dtype)
            case "mixed by matrices":
                x = self.one(x) + torch.matmul(torch.softmax(x @ x.t(), -1), x)
                return torch.matmul(torch.softmax(x @ x.t(), -1), x) + self.two(x)
            case "rounded":
                x = (x.bfloat16() + self.one(x).bfloat16()).float()
                return (self.two(x).bfloat16() + x.bfloat16()).float()
        raise AssertionError


def seen(model: nn.Module, x: Tensor) -> Census:
    (captured,) = capture(model, x)
    return census(captured.gm)


@pytest.mark.parametrize(
    ("form", "products", "why"),
    [
        ("pointwise", {}, "nothing mixes features"),
        ("plain", {"linear": 2}, "nothing is added"),
        ("two towers", {"linear": 2}, "no sum has an operand that the other one is computed from"),
        ("rounded", {"linear": 2}, "2 sums are computed in a lower precision than the stream has"),
        ("mixed by matrices", {"matmul": 4, "linear": 2}, "2 sums multiply the stream itself"),
    ],
)
def test_it_says_why_there_is_no_stream(form: str, products: dict[str, int], why: str) -> None:
    found = seen(Net(form), torch.randn(3, 8))

    assert found.products == products
    assert why in str(found)


@pytest.mark.parametrize("form", ["scaled by numbers", "scaled by weights", "scaled after a shift"])
def test_a_sum_that_scales_its_stream_by_numbers_or_weights_is_residual(form: str) -> None:
    assert seen(Net(form), torch.randn(3, 8)).sums == 2


class Region(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    @torch.compiler.nested_compile_region
    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(h)))


def test_it_says_what_hides_the_layers() -> None:
    found = seen(nn.Sequential(Region(), Region()), torch.randn(3, 8))

    assert found.sums == 0
    assert "nested_compile_region" in str(found)


def test_it_counts_residual_sums() -> None:
    found = seen(Tower(3), vectors())

    assert (found.adds, found.sums, found.products) == (3, 3, {"linear": 9})


def test_it_names_what_it_does_not_know() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).abs()

    assert "fft_rfft" in str(seen(Unknown(), torch.randn(3, 8)))
