"""What is said to be possible is what comes of the plan that does it, and nothing else is."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

import fxfuse
from fxfuse import Plan
from fxfuse.errors import PlanError
from fxfuse.report import possible
from fxfuse.report.possible import LONELY
from tests.models.blocks import WIDTH, Stream, SwiGLU
from tests.models.decoders import IndexedExperts
from tests.models.tiny import Layer, Tower, llama, tokens, vectors


class Gelu(nn.Module):
    """As the FFN of a `Tower`, with another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def tower(layers: int, **others: nn.Module) -> Tower:
    """A `Tower` some of whose FFNs (``at_1=...``) are others."""
    model = Tower(layers)
    for at, ffn in others.items():
        layer = model.layers[int(at.removeprefix("at_"))]
        assert isinstance(layer, Layer)
        layer.mlp = ffn.double()  # type: ignore[assignment]  # of the same signature
    return model


def joins(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    rows = fxfuse.explain(model, *args, **kwargs).branches
    return {row.name: [(join.other, join.once) for join in row.joins] for row in rows}


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (llama(3), (tokens(),)),
        (tower(4, at_1=Gelu()), (vectors(),)),
        (tower(4, at_0=Gelu(), at_3=Gelu()), (vectors(),)),
    ],
    ids=["attentions between", "another activation between", "others at both ends"],
)
def test_two_ffns_could_join_exactly_if_the_plan_that_says_so_makes_them_wide(model: nn.Module, given: Any) -> None:
    rows = fxfuse.explain(model, *given).branches
    ffns = [row for row in rows if row.kind == "gated_ffn"]
    names = [row.name for row in rows]
    could: dict[str, set[str]] = {row.name: {join.other for join in row.joins} for row in ffns}

    for one, other in combinations(ffns, 2):
        between = rows[names.index(one.name) + 1 : names.index(other.name)]
        gone = [row.name for row in between if row.kind == "attention"]
        plan = Plan(drop=gone, parallel=[[one.name, other.name]])
        planned = {row.name: row.fused for row in fxfuse.explain(model, *given, plan=plan).branches}
        wide = planned[one.name] == planned[other.name] == "wide"
        nearest = not any(row.name in could[one.name] for row in between)
        assert (other.name in could[one.name]) == (one.name in could[other.name]) == (wide and nearest)


def test_what_stands_between_is_named_and_where_nothing_does_nothing() -> None:
    model = llama(3)
    mlps = [f"model.layers.{k}.mlp" for k in range(3)]
    once = [(f"model.layers.{k}.self_attn",) for k in range(3)]

    found = joins(model, tokens(), use_cache=False)

    assert found[mlps[1]] == [(mlps[0], once[1]), (mlps[2], once[2])]
    assert found[mlps[0]] == [(mlps[1], once[1])]
    assert not any(found[name] for (name,) in once)
    assert joins(Tower(2), vectors()) == {
        "layers.0.mlp": [("layers.1.mlp", ())],
        "layers.1.mlp": [("layers.0.mlp", ())],
    }


def test_the_reason_says_it_in_words() -> None:
    rows = {row.name: row.reason for row in fxfuse.explain(llama(2), tokens(), use_cache=False).branches}

    assert rows["model.layers.0.mlp"] == "could join model.layers.1.mlp once model.layers.1.self_attn is dropped"


def test_who_cannot_join_is_told_by_the_pass_what_differs() -> None:
    rows = {row.name: row for row in fxfuse.explain(tower(3, at_1=Gelu()), vectors()).branches}

    assert not rows["layers.1.mlp"].joins
    assert rows["layers.1.mlp"].reason == "its activation differs from that of layers.0.mlp"
    assert [join.other for join in rows["layers.0.mlp"].joins] == ["layers.2.mlp"]


def test_nobody_joins_over_experts_or_alone() -> None:
    model = Stream(SwiGLU(), IndexedExperts(), SwiGLU()).double().eval()
    rows = fxfuse.explain(model, vectors(2, 3, WIDTH)).branches

    assert [row.kind for row in rows] == ["gated_ffn", "moe", "gated_ffn"]
    assert [row.reason == LONELY for row in rows] == [True, False, True]
    assert fxfuse.explain(Tower(1), vectors()).branches[0].reason == LONELY


def test_one_that_the_passes_cannot_move_does_not_keep_the_others_from_joining(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tower(5)
    stuck = model.mlps[2]
    applied = possible._applied

    def refuse(gm: Any, names: Any, plan: Plan) -> Any:
        if stuck in plan.parallel[0]:
            raise PlanError(f"{stuck!r} cannot be moved")
        return applied(gm, names, plan)

    monkeypatch.setattr(possible, "_applied", refuse)

    rows = {row.name: row for row in fxfuse.explain(model, vectors()).branches}

    assert {name: [join.other for join in rows[name].joins] for name in model.mlps} == {
        model.mlps[0]: [model.mlps[1]],
        model.mlps[1]: [model.mlps[0]],
        stuck: [],
        model.mlps[3]: [model.mlps[4]],
        model.mlps[4]: [model.mlps[3]],
    }
    assert "cannot be moved" in rows[stuck].reason
