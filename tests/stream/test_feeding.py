"""Streams that feed each other: what is named is applied exactly, or the plan is refused in words."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import PlanError, RecordError
from fxfuse.passes import apply_plan
from tests.models.blocks import WIDTH, ready, trace, vectors


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(self.norm(h))))
        return out


class Feeding(nn.Module):
    """Two or three streams, or one with skips; branches that are in ``off`` contribute nothing."""

    def __init__(self, form: str, depth: int = 3) -> None:
        super().__init__()
        self.form, self.depth = form, depth
        self.f, self.g, self.k = (nn.ModuleList(Block() for _ in range(depth)) for _ in range(3))
        self.start, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.without(x, ())

    def without(self, x: Tensor, off: Collection[str]) -> tuple[Tensor, ...]:
        def branch(name: str, i: int, h: Tensor) -> Tensor:
            out: Tensor = getattr(self, name)[i](h)
            return torch.zeros_like(out) if f"{name}.{i}" in off else out

        a = self.start(x)
        b = a if self.form.endswith("from one") else self.other(x)
        c, skips = torch.tanh(x), [a]
        for i in range(self.depth):
            if self.form.startswith("two"):
                a = a + branch("f", i, a + b)
                b = b + branch("g", i, a)
            elif self.form.startswith("reversible"):
                a = a + branch("f", i, b)
                b = b + branch("g", i, a)
            elif self.form.startswith("three"):
                a = a + branch("f", i, c)
                b = b + branch("g", i, a)
                c = c + branch("k", i, b)
            elif self.form.startswith("scaled"):
                a = 0.9 * (a + branch("f", i, a + b))
                b = 0.8 * b + branch("g", i, a)
            else:
                a = a + branch("f", i, a)
                skips.append(a)
        if self.form == "skips":
            for i in range(self.depth):
                a = a + 0.5 * skips.pop()
                a = a + branch("g", i, a)
            return (torch.tanh(a),)
        return (torch.tanh(a + b + c),) if self.form.endswith("from one") else (a, b, c)


FORMS = (
    "two", "two from one", "reversible", "reversible from one", "three", "three from one", "scaled", "scaled from one",
    "skips",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_dropped_branches_contribute_nothing_whatever_feeds_on_them(form: str) -> None:
    model, x = ready(Feeding(form)), vectors()
    assert isinstance(model, Feeding)
    whole = trace(model, x)
    names = [branch.name for stream in whole.streams for branch in stream.branches]

    for drop in [(), *itertools.combinations(names, 1), *itertools.combinations(names, 2)]:
        traced = whole.copy()
        apply_plan(traced.gm, fxfuse.Plan(drop=drop), names=traced.names, strict=True)
        if not any(name.startswith("@") for name in drop):
            for one, other in zip(traced(), model.without(x, drop), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_groups_are_applied_or_refused_in_words(form: str) -> None:
    whole = trace(ready(Feeding(form)), vectors())
    branches = [branch for stream in whole.streams for branch in stream.branches]

    for one, other in itertools.combinations(branches, 2):
        traced = whole.copy()
        try:
            apply_plan(traced.gm, fxfuse.Plan(parallel=[[one.name, other.name]]), names=traced.names, strict=True)
        except PlanError as error:
            assert repr(other.name) in str(error) or repr(one.name) in str(error)  # noqa: PT017
        else:
            assert not other.crossing or one.read is other.read


@torch.no_grad()
def test_what_feeds_a_branch_does_not_move_with_it() -> None:
    traced = trace(ready(Feeding("two from one")), vectors())
    before = traced()

    with pytest.raises(PlanError, match=r"'f\.1' cannot be moved in a group: .* another residual stream"):
        apply_plan(traced.gm, fxfuse.Plan(parallel=[["f.0", "f.1"]]), names=traced.names)

    torch.testing.assert_close(traced(), before, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_such_a_model_is_explained_and_recorded_under_drops(form: str) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Feeding(form, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.model(x)[0]
            return out

    model, batch = ready(First()), {"x": vectors()}
    names = [branch.name for branch in fxfuse.explain(model, **batch).branches]

    for drop in [[], names[:1]]:
        plan = fxfuse.Plan(drop=drop)
        fxfuse.explain(model, plan=plan, **batch)
        with suppress(RecordError):  # under the drop no stream may be left
            fxfuse.record(model, [batch], plan=plan)
