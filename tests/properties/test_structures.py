"""Plans for models whose branches are not independent: shared values, several streams, tied weights, written memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import PlanError
from fxfuse.passes import apply_plan
from tests.models import as_tuple, assert_exact, capture
from tests.properties.examples import examples

WIDTH = 6


class Block(nn.Module):
    """A pre-norm FFN whose hidden units may be mixed with a value that another branch made."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 8)
        self.down = nn.Linear(8, WIDTH)

    def forward(self, h: Tensor, taken: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value = self.up(self.norm(h))
        return self.down(torch.relu(value) if taken is None else torch.relu(value) * taken), value


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.double().eval().parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


X = torch.linspace(-1, 2, 2 * 3 * WIDTH, dtype=torch.float64).view(2, 3, WIDTH)


class ValueResidual(nn.Module):
    """Later branches take a value that the branch ``producer`` made (value residuals, cross-layer keys and values)."""

    def __init__(self, producer: int, consumers: frozenset[int]) -> None:
        super().__init__()
        self.producer, self.consumers = producer, consumers
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        shared = None
        for i, block in enumerate(self.blocks):
            f, value = block(h, shared if i in self.consumers else None)
            if i == self.producer:
                shared = value
            h = h + f
        return h

    def planned(self, x: Tensor, drop: set[int], group: list[int]) -> Tensor:
        h = x * 2
        shared = None
        for i in range(5):
            now = sorted(group) if group and i == min(group) else [] if i in group else [i]
            added = []
            for j in now:
                f, value = self.blocks[j](h, shared if j in self.consumers else None)
                if j == self.producer:
                    shared = value
                if j not in drop:
                    added.append(f)
            for f in added:
                h = h + f
        return h


@st.composite
def value_residuals(draw: st.DrawFn) -> tuple[int, frozenset[int], set[int], list[int]]:
    producer = draw(st.integers(0, 3))
    consumers = draw(st.sets(st.integers(producer + 1, 4), min_size=1))
    group = draw(st.lists(st.integers(0, 4), unique=True, max_size=4).filter(lambda group: len(group) != 1))
    left = [i for i in range(5) if i not in group]
    drop = draw(st.sets(st.sampled_from(left))) if left else set()
    return producer, frozenset(consumers), drop, group


@given(case=value_residuals())
@examples(40)
@torch.no_grad()
def test_a_value_that_branches_share_is_there_or_the_plan_is_refused(
    case: tuple[int, frozenset[int], set[int], list[int]],
) -> None:
    """A member may not move before what it needs, unless that moves along; a dropped producer still produces."""
    producer, consumers, drop, group = case
    model = randomised(ValueResidual(producer, consumers))
    assert isinstance(model, ValueResidual)
    plan = fxfuse.Plan(drop=[f"blocks.{i}" for i in drop], parallel=[[f"blocks.{i}" for i in group]] if group else [])
    gm, compiled = capture(model, X)
    stranded = [i for i in group if i in consumers and producer not in group and min(group) < producer]

    if stranded:
        with pytest.raises(PlanError, match="|".join(f"blocks.{i}" for i in stranded)):
            apply_plan(gm, plan)
        assert_exact(as_tuple(compiled(X)), as_tuple(model(X)))
    else:
        apply_plan(gm, plan)
        assert_exact(as_tuple(compiled(X)), [model.planned(X, drop, group)])


class TwoStreams(nn.Module):
    """An encoder, and a decoder that reads what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block() for _ in range(3))
        self.decoder = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.planned(x, [])

    def planned(self, x: Tensor, parallel: list[nn.ModuleList]) -> Tensor:
        e = x * 2
        for block in self.encoder:
            e = e + block(x * 2 if self.encoder in parallel else e)[0]
        memory = torch.tanh(e.mean(1, keepdim=True).expand_as(x))
        d = start = x.flip(0) * 3
        for block in self.decoder:
            d = d + block((start if self.decoder in parallel else d) + memory)[0]
        return d


@pytest.mark.parametrize("streams", [["encoder"], ["decoder"], ["encoder", "decoder"]])
@torch.no_grad()
def test_each_of_two_streams_follows_its_own_groups(streams: list[str]) -> None:
    model = randomised(TwoStreams())
    assert isinstance(model, TwoStreams)
    gm, compiled = capture(model, X)

    apply_plan(gm, fxfuse.Plan(parallel=[[f"{name}.{i}" for i in (0, 1, 2)] for name in streams]))

    assert_exact(as_tuple(compiled(X)), [model.planned(X, [getattr(model, name) for name in streams])])


@torch.no_grad()
def test_a_group_across_two_streams_is_refused() -> None:
    model = randomised(TwoStreams())
    gm, compiled = capture(model, X)

    with pytest.raises(PlanError, match=r"(?s)decoder.1.*stream"):
        apply_plan(gm, fxfuse.Plan(parallel=[["encoder.0", "decoder.1"]]))

    assert_exact(as_tuple(compiled(X)), as_tuple(model(X)))


class Tied(nn.Module):
    """One block, run three times: its name is ambiguous, so its places are called @0, @1, @2."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        for _ in range(3):
            h = h + self.block(h)[0]
        return h


@torch.no_grad()
def test_a_block_that_runs_three_times_is_planned_by_place() -> None:
    model = randomised(Tied())
    block = model.get_submodule("block")
    gm, compiled = capture(model, X)

    apply_plan(gm, fxfuse.Plan(drop=["@0"], parallel=[["@2", "@1"]]), strict=True)

    h = X * 2
    assert_exact(as_tuple(compiled(X)), [h + block(h)[0] + block(h)[0]])


class WritesInPlace(nn.Module):
    """Keeps views of a stream that later sums overwrite: what the caller passed, and a hidden state taken earlier."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 2 if self.own else x
        h += self.blocks[0](h)[0]
        early = h[:, :1]
        h.add_(self.blocks[1](h)[0])
        h = h + self.blocks[2](h)[0]
        return early, h


@pytest.mark.parametrize("own", [True, False])
@torch.no_grad()
def test_memory_that_a_sum_writes_is_written_under_an_empty_plan(own: bool) -> None:
    model = randomised(WritesInPlace(own))
    gm, compiled = capture(model, X.clone())
    x, expected_x = X.clone(), X.clone()
    expected = model(expected_x)

    apply_plan(gm, fxfuse.Plan())

    assert_exact(as_tuple(compiled(x)), expected)
    assert_exact([x], [expected_x])


@pytest.mark.parametrize("own", [True, False])
@torch.no_grad()
def test_memory_that_a_sum_writes_is_right_under_a_plan_or_the_plan_is_refused(own: bool) -> None:
    """Dropping the branch of an in-place sum leaves the write of the other; whoever cannot do that must say so."""
    model = randomised(WritesInPlace(own))
    blocks = model.get_submodule("blocks")
    gm, compiled = capture(model, X.clone())
    try:
        apply_plan(gm, fxfuse.Plan(drop=["blocks.1"]))
    except PlanError as error:
        assert "blocks.1" in str(error)  # noqa: PT017
        return

    x, h = X.clone(), X.clone()
    h = h * 2 if own else h
    h = h + blocks[0](h)[0]
    assert_exact(as_tuple(compiled(x)), (h[:, :1], h + blocks[2](h)[0]))
    assert_exact([x], [X if own else h])


class Autocast(nn.Module):
    """Each block in an autocast region of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        for block in self.blocks:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                f = block(h)[0]
            h = h + f
        return h


@torch.no_grad()
def test_nothing_moves_across_the_border_of_an_autocast_region() -> None:
    model = randomised(Autocast()).float()
    gm, compiled = capture(model, X.float())

    with pytest.raises(PlanError, match=r"(?s)blocks.1.*autocast"):
        apply_plan(gm, fxfuse.Plan(parallel=[["blocks.0", "blocks.1"]]))

    torch.testing.assert_close(compiled(X.float()), model(X.float()), rtol=0, atol=0)
