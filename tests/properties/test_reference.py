"""The reference is trusted because models that were written planned agree with it, through their own forward."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.models import ResidualModel, as_tuple, build, make_input, reference
from tests.models import spec as s
from tests.models.strategies import residual_models, swiglu_models


def outputs(model: ResidualModel, x: Tensor) -> tuple[Tensor, ...]:
    """What the model itself computes; a copy of the input, since a model may write in place."""
    with torch.no_grad():
        return as_tuple(model(x.clone()))


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(got) == len(expected)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@given(spec=residual_models())
def test_without_a_plan_the_reference_is_the_model(spec: s.Model) -> None:
    model, x = build(spec), make_input(spec)

    with torch.no_grad():
        assert_same(reference(model, x), outputs(model, x))


@given(spec=residual_models(), data=st.data())
def test_dropping_is_the_model_that_never_had_the_branches(spec: s.Model, data: st.DataObject) -> None:
    """Branches that lend their norm to others stay, as the smaller model could not be written."""
    spec = replace(spec, taps="none" if spec.taps == "sums" else spec.taps)
    model, x = build(spec), make_input(spec)
    lenders = {f"layers.{i}.{item.branches[0].attribute}" for i, _, item in spec.sums() if item.shared_norm}
    names = [b.name for b in spec.branches if b.name not in lenders]
    assume(names)
    drop = set(data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1)))

    smaller = build(replace(spec, layers=tuple(without(layer, i, drop) for i, layer in enumerate(spec.layers))))
    smaller.load_state_dict(model.state_dict(), strict=False)

    with torch.no_grad():
        assert_same(reference(model, x, drop=drop), outputs(smaller, x))


def without(layer: s.Layer, i: int, drop: set[str]) -> s.Layer:
    sums = []
    for item in layer.sums:
        kept = tuple(b for b in item.branches if f"layers.{i}.{b.attribute}" not in drop)
        if len(kept) == 1 and item.form not in s.ONE_BRANCH_FORMS:
            item = replace(item, form="h+f")
        assume(kept == item.branches or item.before == item.after == "none")  # a smaller sum keeps its factors
        if kept:
            sums.append(replace(item, branches=kept))
    return s.Layer(tuple(sums))


@given(spec=residual_models(), data=st.data())
def test_a_linear_attention_is_the_model_whose_attention_is_its_output_projection(
    spec: s.Model, data: st.DataObject
) -> None:
    names = [b.name for b in spec.branches if b.kind == "attention"]
    assume(names)
    linear = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    model, x = build(spec), make_input(spec)
    made = copy.deepcopy(model)
    for name in linear:
        body = made.get_submodule(name)
        body.forward = lambda y, mask, body=body: body.o(y)

    with torch.no_grad():
        assert_same(reference(model, x, linear=linear), outputs(made, x))


@given(spec=swiglu_models(), data=st.data())
def test_a_narrowed_ffn_is_the_model_that_never_had_the_other_units(spec: s.Model, data: st.DataObject) -> None:
    """Of the layout whose units are easy to take by hand."""
    spec = replace(spec, layers=tuple(map(separate, spec.layers)))
    model, x = build(spec), make_input(spec)
    made = copy.deepcopy(model)
    narrow = []
    for name in [b.name for b in spec.branches if b.kind == "gated"]:
        body = made.get_submodule(name)
        units = sorted(data.draw(st.sets(st.integers(0, body.down.in_features - 1), min_size=1)))
        narrow.append((name, tuple(units)))
        for projection in (body.gate, body.up):
            projection.weight = torch.nn.Parameter(projection.weight[units])
            if projection.bias is not None:
                projection.bias = torch.nn.Parameter(projection.bias[units])
        body.down.weight = torch.nn.Parameter(body.down.weight[:, units])

    with torch.no_grad():
        assert_same(reference(model, x, narrow=narrow), outputs(made, x))


def separate(layer: s.Layer) -> s.Layer:
    def body(own: s.Body) -> s.Body:
        return replace(own, layout="separate") if isinstance(own, s.FFN) else own

    return s.Layer(
        tuple(replace(i, branches=tuple(replace(b, body=body(b.body)) for b in i.branches)) for i in layer.sums)
    )


@given(spec=residual_models())
def test_a_group_of_one_layer_is_the_model_written_as_one_sum(spec: s.Model) -> None:
    spec = replace(spec, taps="none" if spec.taps == "sums" else spec.taps)
    spec = replace(spec, layers=tuple(map(unedited, spec.layers)))
    model, x = build(spec), make_input(spec)
    branches = [[b.name for b in spec.branches if b.layer == i] for i in range(len(spec.layers))]

    parallel = build(replace(spec, layers=tuple(map(as_one_sum, spec.layers))))
    parallel.load_state_dict(model.state_dict())

    with torch.no_grad():
        assert_same(reference(model, x, parallel=branches), outputs(parallel, x))


def unedited(layer: s.Layer) -> s.Layer:
    """Without edits of contributions, which come before the sum's scale, where the one sum has it before them."""
    return s.Layer(
        tuple(replace(item, branches=tuple(replace(b, edit=None) for b in item.branches)) for item in layer.sums)
    )


def as_one_sum(layer: s.Layer) -> s.Layer:
    if len(layer.sums) == 1:
        return layer
    assume(not any(item.shared_norm for item in layer.sums))
    assume(all(item.before == item.after == "none" for item in layer.sums[1:]))
    branches = tuple(
        replace(b, scale=(b.scale or 1.0) * (item.scale or (-1.0 if item.form == "h-f" else 1.0)))
        for item in layer.sums
        for b in item.branches
    )
    first = layer.sums[0]
    return s.Layer((s.Sum(branches, "terms+h", before=first.before, after=first.after),))


@given(spec=residual_models())
def test_a_layer_on_a_private_copy_of_the_stream_changes_nothing_when_it_is_alone(spec: s.Model) -> None:
    """Each layer the only member of its group, which no plan may write; no tap looks inside a layer, nor a factor."""
    for layer in spec.layers:
        inside = [kind for item in layer.sums for kind in (item.before, item.after)][:-1]
        assume(len(layer.sums) == 1 or all(kind == "none" for kind in inside))
    spec = replace(spec, taps="none" if spec.taps == "sums" else spec.taps)
    model, x = build(spec), make_input(spec)
    alone = [[[b.name for b in spec.branches if b.layer == i]] for i in range(len(spec.layers))]

    with torch.no_grad():
        assert_same(reference(model, x, parallel=alone), outputs(model, x))


def test_the_semantics_by_hand() -> None:
    """Two full blocks in parallel around a kept branch, a distant group, taps between: every value spelled out."""
    layer = s.Layer((s.Sum((s.Branch("attn", s.Attention(2, 1)),)), s.Sum((s.Branch("mlp", s.FFN()),), scale=0.5)))
    spec = s.Model(6, (layer,) * 4, batch=2, length=3, taps="sums", head="none")
    model, x = build(spec), make_input(spec)
    mask = model.causal_mask(3, x.device)

    def attn(i: int, h: Tensor) -> Tensor:
        return model.layers[i].attn(model.layers[i].attn_norm(h), mask)

    def mlp(i: int, h: Tensor) -> Tensor:
        return 0.5 * model.layers[i].mlp(model.layers[i].mlp_norm(h))

    with torch.no_grad():
        first = attn(0, x)
        second = attn(2, x)
        h1 = x + (first + mlp(0, x + first)) + (second + mlp(2, x + second))
        h3 = h1 + attn(1, h1)
        h4 = h3 + mlp(1, h3) + mlp(3, h3)
        expected = (h4, x, h1, h1, h3, h4, h4, h4, h4, h4)
        got = reference(
            model,
            x,
            drop={"layers.3.attn"},
            parallel=[
                ["layers.3.mlp", "layers.1.mlp"],
                [["layers.2.attn", "layers.2.mlp"], ["layers.0.attn", "layers.0.mlp"]],
            ],
        )

    assert_same(got, expected)
