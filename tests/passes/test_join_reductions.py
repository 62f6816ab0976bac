"""What is added to the stream in one place is all-reduced once."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional

from fxfuse import Plan
from fxfuse.errors import VerifyError
from fxfuse.passes import apply_plan, fuse_ffn, join_reductions
from tests.models.blocks import WIDTH, SwiGLU, Traced, assert_same, ready, trace, vectors
from tests.models.sharded import decoder, one_process, shard, tokens

BESIDE = [["layers.0.attn", "layers.0.mlp"], ["layers.1.attn", "layers.1.mlp"]]


@pytest.fixture(autouse=True)
def processes() -> Iterator[None]:
    with one_process():
        yield


def reduce(x: Tensor, kind: str = "sum") -> Tensor:
    return functional.all_reduce(x, kind, dist.group.WORLD)


class Two(nn.Module):
    """``h`` and two branches of it, the sum as a subclass writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.RMSNorm(WIDTH), SwiGLU(), SwiGLU()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        return self.add(h, self.one(self.norm(h)), self.two(self.norm(h)))

    def add(self, h: Tensor, one: Tensor, two: Tensor) -> Tensor:
        return h + reduce(one) + reduce(two)


class Scaled(Two):
    def add(self, h: Tensor, one: Tensor, two: Tensor) -> Tensor:
        return h + 0.5 * reduce(one) - 3 * reduce(two)


class ScaledAlike(Two):
    def add(self, h: Tensor, one: Tensor, two: Tensor) -> Tensor:
        return h + 0.25 * reduce(one) + 0.25 * reduce(two)


class OfTwoKinds(Two):
    def add(self, h: Tensor, one: Tensor, two: Tensor) -> Tensor:
        return h + reduce(one) + reduce(two, "avg")


class Largest(Two):
    """A kind that is not linear."""

    def add(self, h: Tensor, one: Tensor, two: Tensor) -> Tensor:
        return h + reduce(one, "max") + reduce(two, "max")


class ReadElsewhere(Two):
    def add(self, h: Tensor, one: Tensor, two: Tensor) -> Tensor:
        first = reduce(one)
        return (h + first + reduce(two)) * first.sum()


class GainAfterwards(Two):
    """A weight after an all-reduce is one of each process: to move it before would be another function."""

    def add(self, h: Tensor, one: Tensor, two: Tensor) -> Tensor:
        return h + self.gain * reduce(one) + self.gain * reduce(two)


def traced(model: nn.Module) -> tuple[Traced, Tensor]:
    ready(model)
    return trace(model, vectors()), model(vectors())


@pytest.mark.parametrize("model", [Two(), Scaled(), ScaledAlike()], ids=lambda model: type(model).__name__)
def test_two_become_one(model: Two) -> None:
    graph, expected = traced(model)
    report = join_reductions(graph.gm, inputs=graph.inputs, verify=True)

    assert [edit.detail for edit in report.done] == ["2 all-reduces in one"]
    assert graph.count("all_reduce") == 1
    assert_same(graph(), expected)


@pytest.mark.parametrize(
    "model", [OfTwoKinds(), Largest(), ReadElsewhere(), GainAfterwards()], ids=lambda model: type(model).__name__
)
def test_what_is_not_alike_stays(model: Two) -> None:
    graph, expected = traced(model)

    assert not join_reductions(graph.gm).done
    assert graph.count("all_reduce") == 2
    assert_same(graph(), expected)


@pytest.mark.parametrize(
    ("model", "fused"), [(Two(), 1), (Scaled(), 1), (OfTwoKinds(), 0), (Largest(), 0), (GainAfterwards(), 0)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_a_wide_ffn_is_reduced_once(model: Two, fused: int) -> None:
    graph, expected = traced(model)
    report = fuse_ffn(graph.gm, inputs=graph.inputs, verify=True)

    assert len(report.done) == fused
    assert graph.count("all_reduce") == 2 - fused
    assert_same(graph(), expected)


def test_ffns_that_are_not_reduced_alike_say_so() -> None:
    graph, _ = traced(OfTwoKinds())
    report = fuse_ffn(graph.gm)

    assert {edit.detail for edit in report.refused} == {
        "its contribution is not all-reduced as that of two is",
        "its contribution is not all-reduced as that of one is",
    }


def test_a_wide_ffn_of_shared_weights_is_reduced_once() -> None:
    graph, expected = traced(Two())
    fuse_ffn(graph.gm, "share", inputs=graph.inputs, verify=True)

    assert graph.count("all_reduce") == 1
    assert_same(graph(), expected)


def test_no_more_are_joined_than_may_be() -> None:
    graph = trace(shard(decoder(2, beside=True), "dtensor"), tokens())
    report = join_reductions(graph.gm, max_rewrites=1)

    assert [edit.detail for edit in report.done] == ["2 all-reduces in one"]
    assert [edit.detail for edit in report.refused] == ["max_rewrites is spent"]
    assert graph.count("all_reduce") == 3


def test_branches_that_a_plan_makes_parallel_are_reduced_together() -> None:
    model, graph = decoder(2), trace(shard(decoder(2), "dtensor"), tokens())
    apply_plan(graph.gm, Plan(parallel=BESIDE), names=graph.names, inputs=graph.inputs, verify=True)

    assert graph.count("all_reduce") == 2
    assert_same(graph(), model.planned(tokens(), (), BESIDE))


def test_a_wrong_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[join_reductions.__module__], "add_up", lambda graph, start, terms, like: start)
    graph, _ = traced(Two())

    with pytest.raises(VerifyError, match="one all-reduce is not what it replaces"):
        join_reductions(graph.gm, inputs=graph.inputs, verify=True)
