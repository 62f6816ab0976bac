"""Random FFNs for the kernels' tests, the same FFN unfused in plain torch, and the rule that judges an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet
from torch import Tensor, nn

from fxfuse.hardware.configs import TABLE, Kernel
from tests.kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows(kernel: Kernel) -> list[ParameterSet]:
    """Each line of the table with each dtype that it serves, for ``pytest.mark.parametrize(("row", "dtype"), ...)``."""
    return [
        pytest.param(row, dtype, id=f"{index}-{str(dtype).removeprefix('torch.')}")
        for index, row in enumerate(TABLE)
        for dtype in DTYPES
        if row.kernel == kernel and row.bits == dtype.itemsize * 8
    ]


@dataclass(frozen=True)
class Case:
    """The arguments of ``fxfuse::wide_ffn``, in the order of its schema."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    residual: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gain: Tensor | None
    rstd: Tensor | None
    eps: float | None
    activation: str

    @property
    def arguments(self) -> tuple[Tensor | float | str | None, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def to(self, device: torch.device) -> Case:
        return Case(*(each.to(device) if isinstance(each, Tensor) else each for each in self.arguments))


FEW = 8
"""So many tokens are judged together, at least: the error of a handful of numbers is luck, plain torch's too."""


def judged(count: int) -> int:
    """How many tokens to draw where one call is to have ``count``: enough of them for several calls if need be."""
    return count * -(-FEW // count)


def calls(case: Case, count: int) -> list[Case]:
    """The case's tokens ``[M, d]`` in calls of ``count`` each."""
    starts = range(0, len(case.x), count)

    def part(tensor: Tensor | None, start: int) -> Tensor | None:
        return None if tensor is None else tensor[start : start + count]

    return [
        replace(case, x=case.x[start : start + count], residual=part(case.residual, start), rstd=part(case.rstd, start))
        for start in starts
    ]


def draw(
    tokens: Sequence[int],
    d: int,
    width: int,
    dtype: torch.dtype,
    *,
    gated: bool = True,
    biases: bool = True,
    residual: bool = True,
    gain: bool = False,
    norm: str = "eps",
    activation: str = "silu",
    seed: int = 0,
) -> Case:
    """A random FFN for tokens ``[*tokens, d]``; ``norm`` is ``eps``, ``rstd`` or ``none``."""
    made = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made).to(dtype)

    projections = 2 if gated else 1
    x = random(*tokens, d) * 3
    wide = torch.promote_types(dtype, torch.float32)
    return Case(
        x,
        random(projections, width, d) / d**0.5,
        random(d, width) / width**0.5,
        random(*tokens, d) if residual else None,
        random(projections, width) if biases else None,
        random(d) if biases else None,
        random(d) if gain else None,
        x.to(wide).square().mean(-1).add(1e-5).rsqrt() if norm == "rstd" else None,
        1e-5 if norm == "eps" else None,
        activation,
    )


MODULES = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
    "relu2": lambda v: F.relu(v) ** 2,
    "sigmoid": nn.Sigmoid(),
}


def unfused_hidden(case: Case) -> Tensor:
    """The hidden units as a model computes them, op by op, each result rounded to the model's dtype."""
    x = case.x
    if case.eps is not None:
        x = F.rms_norm(x.float(), (x.shape[-1],), eps=case.eps).to(x.dtype)
    elif case.rstd is not None:
        x = (x.float() * case.rstd.unsqueeze(-1)).to(x.dtype)
    if case.gain is not None:
        x = x * case.gain
    biases = [None] * len(case.gate_up) if case.gate_up_bias is None else list(case.gate_up_bias)
    products = [F.linear(x, weight, bias) for weight, bias in zip(case.gate_up, biases, strict=True)]
    hidden = MODULES[case.activation](products[0])
    return hidden * products[1] if len(products) == 2 else hidden


def unfused(case: Case) -> Tensor:
    """The whole FFN likewise."""
    y = F.linear(unfused_hidden(case), case.down, case.down_bias)
    return y if case.residual is None else case.residual + y


def hidden_scale(case: Case) -> Tensor:
    """How large each hidden unit is where nothing cancels: what a rounding error is to be compared with."""
    normed = case.x.double()
    if case.eps is not None:
        normed = F.rms_norm(normed, normed.shape[-1:], eps=case.eps)
    elif case.rstd is not None:
        normed = normed * case.rstd.double().unsqueeze(-1)
    if case.gain is not None:
        normed = normed * case.gain.double()
    products = [product_scale(normed, weight) for weight in case.gate_up]
    if case.gate_up_bias is not None:
        products = [
            torch.hypot(product, bias) for product, bias in zip(products, case.gate_up_bias.double(), strict=True)
        ]
    powers = {"relu2": products[0].square(), "sigmoid": products[0].clamp(min=1)}
    activated = powers.get(case.activation, products[0])
    return activated * products[1] if len(products) == 2 else activated


def product_scale(left: Tensor, right: Tensor, *terms: Tensor | None) -> Tensor:
    """Likewise for ``left right^T`` plus some terms: the root of the sum of squares."""
    squares = left.double().square() @ right.double().square().T
    return sum((term.double().square() for term in terms if term is not None), squares).sqrt()


def assert_as_exact(made: Tensor, plain: Tensor, exact: Tensor, scale: Tensor) -> None:
    """The one rule of numerics: an error of at most twice that of plain torch in the same dtype, plus one rounding.

    Errors are root mean squares against float64; ``scale`` is how large the results are where nothing cancels.
    """
    assert made.dtype == plain.dtype
    assert made.shape == exact.shape == scale.shape
    size = scale.norm().clamp(min=1e-30)
    error, allowed = (((each.double() - exact).norm() / size).item() for each in (made, plain))
    assert error <= 2 * allowed + torch.finfo(made.dtype).eps, f"error {error:.2e}; {allowed:.2e} in plain torch"


def assert_exact_enough(made: Tensor, case: Case) -> None:
    """`assert_as_exact` for a whole FFN."""
    scale = product_scale(hidden_scale(case), case.down, case.residual, case.down_bias)
    assert_as_exact(made, unfused(case), reference.wide_ffn(*case.arguments), scale)
