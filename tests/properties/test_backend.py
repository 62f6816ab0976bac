"""The central property through ``torch.compile(backend="ffnfuse")``: outputs, and the gradients of every parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import fxfuse
from tests.models import ResidualModel, as_tuple, assert_exact, build, make_input
from tests.models import spec as s
from tests.models.strategies import PlanSpec, fusing_plans, swiglu_models
from tests.properties.examples import examples
from tests.properties.test_plan import library_plan, planned, planned_models


def compiled(model: ResidualModel, plan: PlanSpec | None, inner: str, **options: object) -> torch.nn.Module:
    """The model under the backend. Each example starts from an empty Dynamo, so that none meets its recompile limit."""
    torch._dynamo.reset()
    given = {"inner": inner, "strict": True, **options}
    if plan is not None:
        given["plan"] = library_plan(plan)
    return torch.compile(model, backend="ffnfuse", options=given)  # type: ignore[return-value]


@given(case=planned_models(), inner=st.sampled_from(("eager", "aot_eager")), weights=st.sampled_from(("copy", "share")))
@examples(20)
@torch.no_grad()
def test_the_compiled_model_is_the_planned_model(case: tuple[s.Model, PlanSpec], inner: str, weights: str) -> None:
    """The reference comes first and from a copy of the model, because shared weights move the parameters' memory."""
    spec, plan = case
    model, x = build(spec), make_input(spec)
    expected = planned(copy.deepcopy(model), x, plan)

    run = compiled(model, plan, inner, weights=weights)

    assert_exact(as_tuple(run(x)), expected)
    assert_exact(as_tuple(run(x)), expected)


@pytest.mark.slow
@given(case=planned_models(max_layers=3))
@examples(5)
@torch.no_grad()
def test_the_compiled_model_under_inductor_is_the_planned_model(case: tuple[s.Model, PlanSpec]) -> None:
    spec, plan = case
    # On some processors inductor asserts other strides of a depthwise convolution than it gets, without any backend.
    bodies = [branch.body for _, _, item in spec.sums() for branch in item.branches]
    assume(not any(isinstance(body, s.Mixer) and body.kind == "conv" for body in bodies))
    model, x = build(spec), make_input(spec)

    run = compiled(model, plan, "inductor")

    assert_exact(as_tuple(run(x)), planned(model, x, plan))


@given(spec=swiglu_models(), inner=st.sampled_from(("eager", "aot_eager")))
@examples(5)
@torch.no_grad()
def test_without_a_plan_the_compiled_model_is_the_model(spec: s.Model, inner: str) -> None:
    model, x = build(spec), make_input(spec)

    run = compiled(model, None, inner)

    assert_exact(as_tuple(run(x)), as_tuple(model(x)))


HOW: st.SearchStrategy[dict[str, str]] = st.sampled_from(
    ({"weights": "copy"}, {"weights": "share"}, {"kernels": "fxfuse"})
)  # fmt: skip


@given(case=planned_models(in_place=False), how=HOW)
@examples(20)
def test_gradients_are_those_of_the_planned_model(case: tuple[s.Model, PlanSpec], how: dict[str, str]) -> None:
    """Of every parameter and of the input; a dropped branch gets none from either."""
    spec, plan = case
    model, x = build(spec), make_input(spec)
    twin = copy.deepcopy(model)
    x_twin = x.clone()
    if x.is_floating_point():
        x, x_twin = x.requires_grad_(), x_twin.requires_grad_()

    run = compiled(model, plan, "aot_eager", **how)
    loss(as_tuple(run(x))).backward()
    loss(planned(twin, x_twin, plan)).backward()

    pairs = [*zip(model.parameters(), twin.parameters(), strict=True), (x, x_twin)]
    names = [*(name for name, _ in model.named_parameters()), "the input"]
    for name, (one, other) in zip(names, pairs, strict=True):
        if other.grad is None:
            assert one.grad is None or not one.grad.any(), name
        else:
            assert one.grad is not None, name
            assert_exact([one.grad], [other.grad])


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    """A number that every element of every output moves differently."""
    total = torch.zeros((), dtype=torch.float64)
    for i, output in enumerate(outputs):
        weights = torch.linspace(-1, 2 + i, output.numel(), dtype=output.dtype).view(output.shape)
        total = total + (weights * output).sum().double()
    return total


@given(data=st.data(), how=HOW)
@examples(8)
def test_the_wide_weights_follow_an_optimizer_and_new_weights(data: st.DataObject, how: dict[str, str]) -> None:
    """The same compiled model after an optimizer step, after load_state_dict and after a parameter is replaced."""
    spec = data.draw(swiglu_models())
    plan = data.draw(fusing_plans(spec))
    model, x = build(spec), make_input(spec)
    other = build(s.Model(**{**vars(spec), "seed": spec.seed + 1})).state_dict()
    run = compiled(model, plan, "aot_eager", **how)

    def check() -> None:
        with torch.no_grad():
            assert_exact(as_tuple(run(x)), planned(model, x, plan))

    check()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss(as_tuple(run(x))).backward()
    optimizer.step()
    check()
    model.load_state_dict(other)
    check()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.detach() * 0.5)
    check()
    model.load_state_dict({name: 2 * value for name, value in other.items()}, assign=True)
    check()


def test_a_plan_that_does_not_fit_raises_with_the_reason_in_its_first_words() -> None:
    layer = s.Layer((s.Sum((s.Branch("mlp", s.FFN()),)),))
    model = build(s.Model(6, (layer,) * 2))
    torch._dynamo.reset()
    plan = fxfuse.Plan(parallel=[["layers.0.mlp", "layers.1.mpl"]])

    with pytest.raises(Exception, match=r"(?s)'layers.1.mpl'.*nearest: layers.1.mlp"):
        torch.compile(model, backend="ffnfuse", options={"plan": plan, "inner": "eager"})(make_input(model.spec))
