"""Streams that are multiplied on their way: a contribution is scaled by every factor after the place where it is added.

The reference is the model itself, told which branches leave and which read one point.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import pytest
import torch
from torch import Tensor, nn

from fxfuse.backend.frontend import capture
from fxfuse.measure.instrument import Instrumented
from fxfuse.passes import REPORTS, apply_plan, simplify
from fxfuse.plan import Plan
from tests.models.blocks import MLP, WIDTH, on_both_roads, ready, trace, vectors


class Scaled(nn.Module):
    """Four FFNs on a stream that each layer scales in one form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.mlps = nn.ModuleList(MLP() for _ in range(4))
        self.scalars = nn.ParameterList(torch.tensor(0.6 + 0.1 * i) for i in range(4))
        self.vectors = nn.ParameterList(torch.linspace(0.5, 1.4 + 0.1 * i, WIDTH) for i in range(4))
        self.register_buffer("layer_scalar", torch.full((1,), 0.8))

    def layer(self, i: int, h: Tensor, added: Sequence[Tensor]) -> Tensor:
        take, leave = FORMS[self.form]
        h = take(self, i, h)
        for f in added:
            h = h + f
        return leave(self, i, h)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.planned(x)

    def planned(self, x: Tensor, drop: Collection[int] = (), group: Sequence[int] = ()) -> tuple[Tensor, ...]:
        h, points = x * 1.5, []
        for i, mlp in enumerate(self.mlps):
            if i in group:
                added = [0.5 * self.mlps[j](h) for j in group] if i == min(group) else []
            else:
                added = [] if i in drop else [0.5 * mlp(h)]
            h = self.layer(i, h, added)
            points.append(h)
        return (torch.tanh(h), *points) if self.form == "seen between" else (h,)


Step = Callable[[Scaled, int, Tensor], Tensor]


def same(_: Scaled, i: int, h: Tensor) -> Tensor:
    return h


def in_place(model: Scaled, i: int, h: Tensor) -> Tensor:
    h *= model.layer_scalar
    return h


FORMS: dict[str, tuple[Step, Step]] = {
    "c * (h + f)": (same, lambda _, i, h: 0.7 * h),
    "(h + f) / c": (same, lambda _, i, h: h / 2),
    "learned number * (h + f)": (same, lambda model, i, h: h * model.scalars[i]),
    "buffer * (h + f) in place": (same, in_place),
    "vector * (h + f)": (same, lambda model, i, h: model.vectors[i] * h),
    "a * h + f": (lambda _, i, h: 0.9 * h, same),
    "learned number * h + f": (lambda model, i, h: h * model.scalars[i], same),
    "vector * h + f": (lambda model, i, h: model.vectors[i] * h, same),
    "vector * (h + bias) + f": (lambda model, i, h: (h + model.vectors[i - 1]) * model.vectors[i], same),
    "c * (a * h + f)": (lambda _, i, h: 0.9 * h, lambda model, i, h: h * model.vectors[i]),
    "seen between": (lambda _, i, h: 0.9 * h, lambda model, i, h: h * model.scalars[i]),
}

PLANS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((), ()), ((1,), ()), ((0, 3), ()), ((0, 1, 2), ()), ((), (1, 2)), ((), (0, 1, 3)), ((1,), (0, 2)), ((2,), (3, 1)),
)  # fmt: skip


def made(form: str) -> Scaled:
    model = ready(Scaled(form))
    assert isinstance(model, Scaled)
    return model


def plan_of(drop: Sequence[int], group: Sequence[int]) -> Plan:
    return Plan(drop=[f"mlps.{i}" for i in drop], parallel=[[f"mlps.{i}" for i in group]] if group else [])


@pytest.mark.parametrize("form", FORMS)
def test_a_scaled_stream_is_one_stream_each_side_of_a_factor_a_point_of_it(form: str) -> None:
    traced = trace(made(form), vectors())
    simplify(traced.gm)
    stream = traced.stream

    assert [(branch.name, stream.sums_before(branch.read)) for branch in stream.branches] == [
        (f"mlps.{i}", i) for i in range(4)
    ]
    assert len(stream.sums) == 4
    assert len(stream.points) > 5
    assert [stream.levels[point] for point in stream.points] == list(range(len(stream.points)))


@on_both_roads
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_planned_graph_scales_each_contribution_by_the_factors_after_it(form: str, road: str) -> None:
    model, x = made(form), vectors()
    whole = trace(model, x, road=road)

    for drop, group in PLANS:
        traced = whole.copy()
        apply_plan(traced.gm, plan_of(drop, group), names=traced.names, strict=True)

        expected = model.planned(x, drop, group)
        got = traced()
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_members_that_were_scaled_apart_become_one_wide_ffn(form: str) -> None:
    traced = trace(made(form), vectors())

    apply_plan(traced.gm, plan_of((), (0, 2, 3)), names=traced.names, kernels="fxfuse")

    (fusion,) = [report for report in traced.gm.meta[REPORTS] if report.name == "fuse_ffn"]
    assert [set(edit.branches) for edit in fusion.done] == [{"mlps.0", "mlps.2", "mlps.3"}]
    expected = traced_model_output(form)
    torch.testing.assert_close(traced()[0], expected, rtol=0, atol=1e-8)


@torch.no_grad()
def traced_model_output(form: str) -> Tensor:
    return made(form).planned(vectors(), (), (0, 2, 3))[0]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_what_is_measured_without_a_plan_is_what_the_plan_does(form: str) -> None:
    model, x = made(form), vectors()
    (captured,) = capture(model, x)
    simplify(captured.gm)
    instrumented = Instrumented(captured.gm, captured.names, max_group=4)
    instrumented(*captured.inputs)

    for index in range(4):
        changed = instrumented.dropped(index).outputs
        torch.testing.assert_close(changed[0], model.planned(x, (index,))[0], rtol=0, atol=1e-8)
    groups = list(instrumented.grouped())
    assert len(groups) == 6
    for names, _, changed_by_group in groups:
        members = [int(name.removeprefix("mlps.")) for name in names]
        expected = model.planned(x, (), members)
        torch.testing.assert_close(changed_by_group.outputs[0], expected[0], rtol=0, atol=1e-8)


class Sandwiched(nn.Module):
    """``c * (h + f(h)) + g(h)``: what is in brackets is a sum of its own, though nothing else reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = MLP(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        return 0.7 * (h + self.f(h)) + self.g(h)


@torch.no_grad()
def test_a_sum_that_is_multiplied_is_not_a_part_of_the_next() -> None:
    model, x = ready(Sandwiched()), vectors()
    traced = trace(model, x)
    assert [len(each.branches) for each in traced.stream.sums] == [1, 1]

    apply_plan(traced.gm, Plan(parallel=[["f", "g"]]), names=traced.names, strict=True)

    h = x * 1.5
    expected = 0.7 * (h + model.get_submodule("f")(h) + model.get_submodule("g")(h))
    torch.testing.assert_close(traced()[0], expected, rtol=0, atol=1e-8)


class Alpha(nn.Module):
    """The factor is the ``alpha`` of the add, so no node holds the scaled stream."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(MLP() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        for mlp in self.mlps:
            h = torch.add(mlp(h), h, alpha=0.9)
        return h


@on_both_roads
@torch.no_grad()
def test_a_factor_that_the_add_itself_applies_stays_with_its_sum(road: str) -> None:
    model, x = ready(Alpha()), vectors()
    one, two, three = model.get_submodule("mlps").children()
    whole = trace(model, x, road=road)
    h = x * 1.5

    dropped = whole.copy()
    apply_plan(dropped.gm, Plan(drop=["mlps.1"]), names=dropped.names, strict=True)
    first = 0.9 * h + one(h)
    torch.testing.assert_close(dropped()[0], 0.9 * 0.9 * first + three(0.9 * first), rtol=0, atol=1e-8)

    grouped = whole.copy()
    apply_plan(grouped.gm, Plan(parallel=[["mlps.0", "mlps.2"]]), names=grouped.names, strict=True)
    first = 0.9 * h + one(h) + three(h)
    torch.testing.assert_close(grouped()[0], 0.9 * (0.9 * first + two(first)), rtol=0, atol=1e-8)


@torch.no_grad()
def test_a_private_sequence_sees_no_factor_of_the_sums_it_left() -> None:
    model, x = made("c * (a * h + f)"), vectors()
    traced = trace(model, x)

    apply_plan(traced.gm, Plan(parallel=[[["mlps.0", "mlps.1"], "mlps.2"]]), names=traced.names, strict=True)

    h = x * 1.5
    one = 0.5 * model.mlps[0](h)
    h = model.layer(0, h, [one, 0.5 * model.mlps[1](h + one), 0.5 * model.mlps[2](h)])
    h = model.layer(2, model.layer(1, h, []), [])
    expected = model.layer(3, h, [0.5 * model.mlps[3](h)])
    torch.testing.assert_close(traced()[0], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_a_factor_rounds_as_the_model_rounds(dtype: torch.dtype) -> None:
    model, x = made("c * (a * h + f)").to(dtype), vectors().to(dtype)
    traced = trace(model, x)

    apply_plan(traced.gm, Plan(drop=["mlps.1", "mlps.2"]), names=traced.names, strict=True)

    torch.testing.assert_close(traced()[0], model.planned(x, (1, 2))[0], rtol=0, atol=0)
