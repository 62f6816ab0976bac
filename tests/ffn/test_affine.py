"""Whatever multiplies and shifts a norm's output, in any nesting, is folded into what reads it; and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxfuse.passes import fuse_ffn, merge_gate_up, simplify
from tests.models import spec as s
from tests.models.blocks import MLP, WIDTH, Layer, SwiGLU, Traced, assert_same, ready, trace, vectors
from tests.models.norms import make_norm
from tests.passes.test_fuse_ffn import Side
from tests.properties.examples import examples

STEPS: dict[str, Callable[[Tensor, nn.Parameter, nn.Parameter], Tensor]] = {
    "a number": lambda x, vector, scalar: 1.7 * x,
    "divided by a number": lambda x, vector, scalar: x / 0.6,
    "negated": lambda x, vector, scalar: -x,
    "a gain": lambda x, vector, scalar: x * vector,
    "one plus a gain": lambda x, vector, scalar: (1 + vector) * x,
    "a learned number": lambda x, vector, scalar: scalar * x,
    "divided by a learned number": lambda x, vector, scalar: x / scalar,
    "divided by a gain": lambda x, vector, scalar: torch.div(x, vector),
    "a shift": lambda x, vector, scalar: vector + x,
    "a learned shift of all": lambda x, vector, scalar: x + scalar,
    "less a shift": lambda x, vector, scalar: x - vector,
    "taken from a shift": lambda x, vector, scalar: vector - x,
    "a multiple of a shift": lambda x, vector, scalar: torch.add(x, vector, alpha=0.3),
    "a gain of three dimensions": lambda x, vector, scalar: x * vector.view(1, 1, -1),
    "a number times a gain": lambda x, vector, scalar: (0.3 * vector) * x,
}
"""What may be done to a norm's output by weights alone."""


class Affine(nn.Module):
    """A norm and such steps after it, each with weights of its own."""

    def __init__(self, norm: nn.Module, steps: Sequence[str]) -> None:
        super().__init__()
        self.norm, self.steps = norm, list(steps)
        self.vectors = nn.ParameterList(torch.ones(WIDTH) for _ in steps)
        self.scalars = nn.ParameterList(torch.ones(index % 2 * (1,)) for index, _ in enumerate(steps))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for step, vector, scalar in zip(self.steps, self.vectors, self.scalars, strict=True):
            x = STEPS[step](x, vector, scalar)
        return x


def side(kind: s.NormKind, *steps: Sequence[str], body: Callable[[], nn.Module] = SwiGLU) -> Side:
    model = ready(Side(*(Layer(body(), Affine(make_norm(s.Norm(kind), WIDTH), own)) for own in steps)))
    assert isinstance(model, Side)
    return model


def fused(model: Side) -> tuple[Traced, bool]:
    """The graph, fused, and whether into one wide FFN; it computes what the model does."""
    traced = trace(model, vectors())
    simplify(traced.gm)
    report = fuse_ffn(traced.gm)
    with torch.no_grad():
        assert_same(traced(), model(vectors()))
    return traced, len(report.done) == 1 and len(report.done[0].branches) == len(model.layers)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["rms_hf", "rms_module", "layer_norm", "rms_parameterless"])
def test_a_step_after_a_norm_is_folded(kind: s.NormKind, step: str) -> None:
    assert fused(side(kind, [step], []))[1]


@given(
    kind=st.sampled_from(["rms_hf", "rms_gain_plus_one", "rms_module", "layer_norm", "layer_norm_parameterless"]),
    steps=st.lists(st.lists(st.sampled_from(list(STEPS)), max_size=5), min_size=2, max_size=3),
    biased=st.booleans(),
)
@examples(40)
def test_any_nesting_of_steps_is_folded(kind: s.NormKind, steps: list[list[str]], biased: bool) -> None:
    assert fused(side(kind, *steps, body=lambda: SwiGLU(bias=biased)))[1]


@given(
    kind=st.sampled_from(["rms_hf", "layer_norm", "layer_norm_parameterless"]),
    steps=st.lists(st.lists(st.sampled_from(list(STEPS)), max_size=4), min_size=2, max_size=3),
)
@examples(15)
def test_gate_and_up_are_merged_under_any_nesting(kind: s.NormKind, steps: list[list[str]]) -> None:
    model = side(kind, *steps, body=Normalised)
    traced = trace(model, vectors())
    simplify(traced.gm)
    report = merge_gate_up(traced.gm)

    assert [edit.branches for edit in report.done] == [tuple(f"layers.{i}.body" for i in range(len(steps)))]
    with torch.no_grad():
        assert_same(traced(), model(vectors()))


class Normalised(MLP):
    """Its output is normalised, so that only its projection can be merged with others."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(super().forward(x), (WIDTH,), eps=1e-5)


class OfTheInput(nn.Module):
    """``norm(x)`` times what the input decides, or a function of it that is not affine."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.function = nn.RMSNorm(WIDTH, eps=1e-5), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.norm(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.mean(-1, keepdim=True),
        lambda x: 1 - x.square(),
        lambda x: torch.div(x, 0.5, rounding_mode="floor"),
        lambda x: 2.0 / x,
        lambda x: torch.tanh(x),
    ],
)
def test_what_is_not_affine_stays(function: Callable[[Tensor], Tensor]) -> None:
    model = ready(Side(Layer(SwiGLU(), OfTheInput(function)), Layer(SwiGLU())))
    assert isinstance(model, Side)

    assert not fused(model)[1]


def test_a_factor_of_the_stream_itself_is_no_part_of_a_norm() -> None:
    """The stream begins with ``1.5 * x``; who reads it without a norm reads it, and not x."""
    model = ready(Side(Layer(SwiGLU(), nn.Identity()), Layer(SwiGLU(), nn.Identity())))
    assert isinstance(model, Side)
    traced = trace(model, vectors())

    for branch in traced.stream.branches:
        assert branch.ffn is not None
        assert branch.ffn.normed.bare is branch.read
    assert fused(model)[1]
