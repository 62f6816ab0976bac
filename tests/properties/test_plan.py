"""The central property: a planned graph computes what the model's own modules compute when run by hand under the plan.

The reference is ``tests.models.reference``, which never calls the library. Everything after the plan is exact, so in
float64 the two agree to 1e-8; lower dtypes are judged by how much worse than the model itself the result is.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import fxfuse
from fxfuse.errors import PlanError
from fxfuse.passes import REPORTS, apply_plan
from fxfuse.passes.emit.kernel import Kernels
from tests.models import (
    ResidualModel,
    as_tuple,
    assert_exact,
    build,
    capture,
    error,
    exported,
    make_input,
    reference,
)
from tests.models import spec as s
from tests.models.strategies import (
    Illegal,
    PlanSpec,
    fusing_plans,
    legal_plans,
    malformed_plans,
    misspelt_plans,
    residual_models,
    swiglu_models,
)
from tests.properties.examples import examples


def library_plan(plan: PlanSpec) -> fxfuse.Plan:
    return fxfuse.Plan(**plan.as_lists())


def planned(model: ResidualModel, x: Tensor, plan: PlanSpec) -> tuple[Tensor, ...]:
    """What the reference says that the plan makes of the model; taps only if the model returns them."""
    outputs = reference(model, x, drop=plan.drop, parallel=plan.parallel, linear=plan.linear, narrow=plan.narrow)
    return outputs if model.spec.taps != "none" else outputs[:1]


@st.composite
def planned_models(
    draw: st.DrawFn, dtype: torch.dtype = torch.float64, max_layers: int = 6, in_place: bool = True
) -> tuple[s.Model, PlanSpec]:
    """A model and a plan for it: any of both, or a run of SwiGLUs that becomes one."""
    if draw(st.integers(0, 2)) == 0:
        spec = draw(swiglu_models(dtype))
        return spec, draw(st.one_of(fusing_plans(spec), legal_plans(spec)))
    spec = draw(residual_models(dtype, max_layers, in_place))
    return spec, draw(legal_plans(spec))


KERNELS = st.sampled_from(("auto", "fxfuse"))


@given(case=planned_models(), dynamic=st.booleans(), kernels=KERNELS)
@examples(80)
@torch.no_grad()
def test_a_planned_dynamo_graph_is_the_planned_model(
    case: tuple[s.Model, PlanSpec], dynamic: bool, kernels: Kernels
) -> None:
    spec, plan = case
    model, x = build(spec), make_input(spec)
    # Numbers of the model are symbolic if dynamic, and to narrow an FFN that takes or is divided by one is refused.
    gm, compiled = capture(model, x, dynamic=dynamic and not plan.narrow)

    assert apply_plan(gm, library_plan(plan), strict=True, kernels=kernels) is gm

    assert_exact(as_tuple(compiled(x)), planned(model, x, plan))


@given(case=planned_models(), strict=st.booleans())
@examples(30)
@torch.no_grad()
def test_a_planned_exported_graph_is_the_planned_model(case: tuple[s.Model, PlanSpec], strict: bool) -> None:
    spec, plan = case
    model, x = build(spec), make_input(spec)
    gm = exported(model, x, strict=strict)

    apply_plan(gm, library_plan(plan), strict=True)

    assert_exact(as_tuple(gm(x)), planned(model, x, plan))


@given(spec=st.one_of(residual_models(), swiglu_models()), export=st.booleans())
@examples(30)
@torch.no_grad()
def test_an_empty_plan_leaves_the_model(spec: s.Model, export: bool) -> None:
    model, x = build(spec), make_input(spec)
    if export:
        gm = compiled = exported(model, x, strict=False)
    else:
        gm, compiled = capture(model, x)

    apply_plan(gm, fxfuse.Plan())

    assert_exact(as_tuple(compiled(x)), as_tuple(model(x)))


@given(data=st.data(), dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
@examples(30)
@torch.no_grad()
def test_a_run_of_swiglus_becomes_one_wide_ffn(data: st.DataObject, dtype: torch.dtype) -> None:
    """Counted in matrix products, so that exactness is not had by never fusing: the run is left with two."""
    spec = data.draw(swiglu_models(dtype))
    plan = data.draw(fusing_plans(spec))
    (run,) = plan.parallel
    model, x = build(spec), make_input(spec)
    gm, _ = capture(model, x)

    apply_plan(gm, library_plan(plan), strict=True)

    (fusion,) = [report for report in gm.meta[REPORTS] if report.name == "fuse_ffn"]
    assert [set(edit.branches) for edit in fusion.done] == [set(run)]
    assert not fusion.refused
    expected = 2 + 1  # the wide FFN and the head
    kept = dict(plan.narrow)
    for i, _, item in spec.sums():
        (branch,) = item.branches
        name = f"layers.{i}.{branch.attribute}"
        if name not in {*run, *plan.drop}:
            expected += products_of(branch.body, kept.get(name))
    assert sum("linear" in str(node.target) for node in gm.graph.nodes) == expected


def products_of(body: s.Body, kept: tuple[int, ...] | None) -> int:
    """How many linear calls a body makes; an FFN that keeps some of its hidden units takes its projections apart."""
    if isinstance(body, s.Attention):
        return 2 if body.packed else 4
    assert isinstance(body, s.FFN)
    narrowed = kept is not None and len(kept) < body.hidden
    return 3 if body.layout == "separate" or narrowed else 2


@given(data=st.data(), dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), kernels=KERNELS)
@examples(40)
@torch.no_grad()
def test_in_a_lower_dtype_the_error_is_that_of_the_unfused_model(
    data: st.DataObject, dtype: torch.dtype, kernels: Kernels
) -> None:
    """error(fused) <= 2 * error(unfused) + eps, both against the float64 reference of the planned model.

    Errors are relative to the size of each output, over eight inputs, so ``eps``, the dtype's own, is one unit in the
    last place of a typical value: what the rounding of the output alone may cost.
    """
    spec, plan = data.draw(planned_models(dtype))
    model, inputs = build(spec), [make_input(spec, number) for number in range(8)]
    gm, compiled = capture(model, inputs[0])
    apply_plan(gm, library_plan(plan), strict=True, kernels=kernels)
    exact = copy.deepcopy(model).double()
    truth = [planned(exact, x.double() if x.is_floating_point() else x, plan) for x in inputs]

    fused = [as_tuple(compiled(x)) for x in inputs]

    unfused = [planned(model, x, plan) for x in inputs]
    assert [t.dtype for t in fused[0]] == [t.dtype for t in unfused[0]]
    assert error(fused, truth) <= 2 * error(unfused, truth) + torch.finfo(dtype).eps


@given(plan=malformed_plans())
def test_a_plan_that_contradicts_itself_cannot_be_made(plan: Illegal) -> None:
    with pytest.raises(PlanError) as caught:
        fxfuse.Plan(drop=plan.drop, parallel=plan.parallel, linear=plan.linear, narrow=plan.narrow)

    assert plan.quoted in str(caught.value)


@given(data=st.data())
@examples(10)
@torch.no_grad()
def test_a_misspelt_member_is_an_error_that_names_its_nearest_and_changes_nothing(data: st.DataObject) -> None:
    spec = data.draw(residual_models(max_layers=3))
    assume(len(spec.branches) > 1)
    plan = data.draw(misspelt_plans(spec))
    model, x = build(spec), make_input(spec)
    gm, compiled = capture(model, x)
    before = gm.code

    with pytest.raises(PlanError) as caught:
        apply_plan(gm, fxfuse.Plan(drop=plan.drop, parallel=plan.parallel))

    assert repr(plan.quoted) in str(caught.value)
    assert any(b.name in str(caught.value).split("nearest")[-1] for b in spec.branches)
    assert gm.code == before
    assert_exact(as_tuple(compiled(x)), as_tuple(model(x)))
