"""What a drop carries over of the streams is what would be found in the graph that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import fxfuse
from fxfuse.passes import apply_plan, canonical
from fxfuse.passes.drop import Drop
from fxfuse.passes.runner import running
from fxfuse.passes.simplify import Simplify
from fxfuse.stream.finder import ResidualStream, find_streams
from tests.models import build, capture, make_input
from tests.models import spec as s
from tests.models.blocks import Layer, Stream, SwiGLU, ready, trace, vectors
from tests.models.strategies import fusing_plans, residual_models, swiglu_models
from tests.properties.examples import examples


def described(stream: ResidualStream) -> list[object]:
    """All that passes ask of a stream; the terms of a sum in no order."""
    lines: list[object] = [stream.points, dict(stream.levels)]
    for residual in stream.sums:
        lines.append((residual.stream, residual.out, residual.write, frozenset(residual.terms)))
        lines += [
            (
                *(branch.name, branch.kind, branch.read, branch.terms, branch.body, branch.nodes, branch.parameters),
                *(branch.foreign, branch.crossing, branch.ffn, branch.gate_up),
                branch.reason.removesuffix(", and holds 1 residual sum of its own"),
            )
            for branch in residual.branches
        ]
    return lines


def assert_carried_as_found(gm: fx.GraphModule, choose: Callable[[list[str]], Collection[str]]) -> None:
    """Drop what ``choose`` chooses of the names of the branches, and find the streams anew beside what was carried."""
    with running(gm, tied=True) as runner:
        runner(Simplify(None))
        graph = runner.name(None)
        names = [branch.name for stream in graph.streams for branch in stream.branches]

        runner(Drop(frozenset(choose(names))))

        assert [described(stream) for stream in graph.streams] == [described(stream) for stream in find_streams(gm)]


@given(spec=st.one_of(residual_models(in_place=False), swiglu_models()), data=st.data())
@examples(40)
@torch.no_grad()
def test_it_is_what_would_be_found_anew(spec: s.Model, data: st.DataObject) -> None:
    gm, _ = capture(build(spec), make_input(spec))

    assert_carried_as_found(gm, lambda names: data.draw(st.sets(st.sampled_from(names), min_size=1)) if names else ())


@pytest.mark.parametrize("dropped", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_so_where_sums_take_the_stream_through_casts(dtype: torch.dtype, dropped: tuple[int, ...]) -> None:
    model = Stream(*(Layer(SwiGLU(), add=lambda h, f: h.float() + f) for _ in range(3)))
    traced = trace(ready(model).to(dtype), vectors().to(dtype))

    assert_carried_as_found(traced.gm, lambda names: [names[index] for index in dropped])


@pytest.mark.parametrize("dropped", [(0,), (1,), (0, 1)])
def test_it_is_so_where_ffns_read_the_stream_itself(dropped: tuple[int, ...]) -> None:
    """Without a norm it is the point of the stream that the projections multiply."""
    traced = trace(ready(Stream(*(Layer(SwiGLU(), norm=nn.Identity()) for _ in range(3)))), vectors())

    assert_carried_as_found(traced.gm, lambda names: [names[index] for index in dropped])


@given(spec=swiglu_models(), data=st.data())
@examples(10)
@torch.no_grad()
def test_streams_are_found_once_and_once_more_after_branches_have_moved(spec: s.Model, data: st.DataObject) -> None:
    plan = data.draw(fusing_plans(spec))
    widths = {
        f"layers.{i}.{branch.attribute}": branch.body.hidden
        for i, _, item in spec.sums()
        for branch in item.branches
        if isinstance(branch.body, s.FFN)
    }
    narrower = any(len(units) < widths[name] for name, units in plan.narrow)
    drops = [f"layers.{i}.{branch.attribute}" for i, _, item in spec.sums() for branch in item.branches][:1]
    for given_plan, count in (
        (fxfuse.Plan(), 1),
        (fxfuse.Plan(drop=drops), 1),
        (fxfuse.Plan(**plan.as_lists()), 2 + narrower),
    ):
        gm, _ = capture(build(spec), make_input(spec))
        with mock.patch.object(canonical, "find_streams", side_effect=find_streams) as finding:
            apply_plan(gm, given_plan, strict=True)
        assert finding.call_count == count
