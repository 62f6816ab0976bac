"""Gate and up of one FFN become one GEMM, wherever the FFN stands; exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfuse.packing.expressions import PACK
from fxfuse.passes import fuse_ffn, merge_gate_up
from tests.models import spec as s
from tests.models.blocks import (
    HIDDEN,
    MLP,
    WIDTH,
    Attention,
    Decoder,
    Layer,
    PackedSwiGLU,
    Stream,
    SwiGLU,
    assert_no_dead_nodes,
    assert_same,
    on_both_roads,
    ready,
    trace,
    vectors,
)
from tests.models.bodies import FFNBody
from tests.models.decoders import Side


class Three(SwiGLU):
    """Three projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x) + torch.tanh(self.third(x)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.empty(WIDTH, HIDDEN)), nn.Parameter(torch.empty(WIDTH, HIDDEN))
        self.w3 = nn.Parameter(torch.empty(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (F.silu(x @ self.w1) * (x @ self.w2)) @ self.w3


MERGED = [
    SwiGLU(),
    SwiGLU(bias=True, up_first=True),
    FFNBody(s.FFN(HIDDEN, bias=(True, False, False)), WIDTH),
    FFNBody(s.FFN(HIDDEN, bias=(False, True, True), flat=True), WIDTH),
    FFNBody(s.FFN(HIDDEN, activation="gelu", gate_scale=0.5), WIDTH),
    Layer(SwiGLU(), nn.LayerNorm(WIDTH)),
    Layer(SwiGLU(), nn.Identity()),
    Three(),
    Transposed(),
]


@on_both_roads
def test_the_projections_of_an_ffn_become_one(road: str) -> None:
    model = ready(Stream(*MERGED))
    traced = trace(model, vectors(), road=road)

    report = merge_gate_up(traced.gm)

    assert [edit.branches for edit in report.done] == [(f"layers.{index}.body",) for index in range(len(MERGED))]
    assert not report.refused
    with torch.no_grad():
        assert_same(traced(), model(vectors()))
    assert_no_dead_nodes(traced.gm)
    assert traced.linears + traced.count("matmul") == 2 * len(MERGED)
    packs = [node for node in traced.gm.graph.nodes if PACK in node.meta and "bias" not in node.meta[PACK]]
    assert len(packs) == len(MERGED)
    assert [branch.name for branch in traced.stream.branches] == [
        f"layers.{index}.body" for index in range(len(MERGED))
    ]


@on_both_roads
def test_projections_that_are_one_already_are_refused_and_others_are_left(road: str) -> None:
    model = ready(Stream(PackedSwiGLU(), MLP(), Attention(), SwiGLU()))
    traced = trace(model, vectors(), road=road)
    before = traced.linears

    report = merge_gate_up(traced.gm)

    assert [edit.branches for edit in report.done] == [("layers.3.body",)]
    (refused,) = report.refused
    assert refused.branches == ("layers.0.body",)
    assert refused.detail == "its projections are one GEMM already"
    assert traced.linears == before - 1
    with torch.no_grad():
        assert_same(traced(), model(vectors()))


class LateExpressions(nn.Module):
    """Each weight is turned round just before it is used, the second after the first product."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.empty(WIDTH, HIDDEN)), nn.Parameter(torch.empty(WIDTH, HIDDEN))
        self.b1, self.b2 = nn.Parameter(torch.empty(HIDDEN)), nn.Parameter(torch.empty(HIDDEN))
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(F.linear(x, self.w1.t(), self.b1 * 2))
        return self.down(gate * F.linear(x, self.w2.t(), self.b2 * 3))


@on_both_roads
def test_weights_that_are_expressions_are_made_before_they_are_packed(road: str) -> None:
    model = ready(Stream(LateExpressions(), LateExpressions()))
    traced = trace(model, vectors(), road=road)

    report = merge_gate_up(traced.gm)

    assert len(report.done) == 2
    with torch.no_grad():
        assert_same(traced(), model(vectors()))


class Post(nn.Module):
    """A norm behind an FFN, which so can be no part of a wide one."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.post = body, nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.post(self.body(x))


def post(body: nn.Module, norm: nn.Module | None = None) -> Layer:
    return Layer(Post(body), norm)


# Branches side by side, and which of them compute their projections in one GEMM.
BESIDE: dict[str, tuple[list[nn.Module], list[tuple[int, ...]]]] = {
    "norms behind": ([post(SwiGLU()), post(SwiGLU(bias=True))], [(0, 1)]),
    "three, of other widths and layouts": ([post(SwiGLU(5)), post(PackedSwiGLU(7)), post(MLP(3))], [(0, 1, 2)]),
    "other activations": ([SwiGLU(), MLP(), FFNBody(s.FFN(HIDDEN, activation="gelu"), WIDTH)], [(0, 1, 2)]),
    "shifts of layer norms": (
        [post(SwiGLU(), nn.LayerNorm(WIDTH)), post(SwiGLU(bias=True), nn.LayerNorm(WIDTH))],
        [(0, 1)],
    ),
    "one in two dimensions": ([post(FFNBody(s.FFN(HIDDEN, flat=True), WIDTH)), post(SwiGLU())], [(0, 1)]),
    "two kinds of norm before": (
        [post(SwiGLU()), post(SwiGLU()), post(SwiGLU(), nn.LayerNorm(WIDTH)), post(SwiGLU(), nn.LayerNorm(WIDTH))],
        [(0, 1), (2, 3)],
    ),
    "past an attention": ([post(SwiGLU()), Attention(), post(SwiGLU())], [(0, 2)]),
    "another eps": ([post(SwiGLU(), nn.RMSNorm(WIDTH, eps=eps)) for eps in (1e-5, 1e-3)], []),
}


@on_both_roads
@pytest.mark.parametrize("name", BESIDE)
def test_ffns_side_by_side_that_cannot_be_one_share_their_projections(name: str, road: str) -> None:
    bodies, groups = BESIDE[name]
    model = ready(Side(*bodies))
    traced = trace(model, vectors(), road=road)

    report = merge_gate_up(traced.gm, alone=False)

    expected = [tuple(f"layers.{index}.body" for index in group) for group in groups]
    assert [tuple(name.removesuffix(".body.body") + ".body" * name.endswith(".body.body") for name in edit.branches)
            for edit in report.done] == expected  # fmt: skip
    assert all("no wider: its" in edit.detail for edit in report.done)
    with torch.no_grad():
        assert_same(traced(), model(vectors()))
    assert_no_dead_nodes(traced.gm)


@on_both_roads
def test_sharing_merges_only_what_reads_the_very_same_value(road: str) -> None:
    """The weights stay as they are: no gain is folded into them."""
    own, common = [post(SwiGLU()), post(SwiGLU())], [post(SwiGLU()), post(SwiGLU())]
    common[1].norm = common[0].norm
    for layers, merged in ((own, 0), (common, 1)):
        model = ready(Side(*layers))
        traced = trace(model, vectors(), road=road)

        report = merge_gate_up(traced.gm, weights="share", alone=False)

        assert len(report.done) == merged
        with torch.no_grad():
            assert_same(traced(), model(vectors()))
        packed = [node for node in traced.gm.graph.nodes if PACK in node.meta]
        assert all(part.op in ("placeholder", "get_attr") for node in packed for part in node.args[0])


def test_what_is_wide_already_is_left_alone() -> None:
    model = ready(Side(SwiGLU(), SwiGLU(), MLP(), MLP()))
    traced = trace(model, vectors())
    fuse_ffn(traced.gm)

    assert not merge_gate_up(traced.gm, alone=False)


def test_ffns_in_regions_of_their_own_stay_apart() -> None:
    class Bordered(Side):
        def forward(self, x: Tensor) -> Tensor:
            h = self.start(x)
            parts = []
            for layer in self.layers:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    parts.append(layer.branch(h))
            return h + parts[0] + parts[1]

    traced = trace(ready(Bordered(post(SwiGLU()), post(SwiGLU()))).float(), vectors().float())

    assert not merge_gate_up(traced.gm, alone=False)


def test_a_merged_graph_has_nothing_to_merge() -> None:
    traced = trace(ready(Stream(SwiGLU())), vectors())
    merge_gate_up(traced.gm)
    before = traced.gm.code

    assert not merge_gate_up(traced.gm)
    assert traced.gm.code == before


@on_both_roads
def test_a_residual_model_in_place_is_merged_exactly(road: str) -> None:
    class InPlace(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            h = x * 1.5
            for layer in self.layers:
                h += layer.mlp(layer.mlp_norm(h))
            return h

    model = ready(InPlace())
    traced = trace(model, vectors(), road=road)

    merge_gate_up(traced.gm)

    with torch.no_grad():
        assert_same(traced(), model(vectors()))
    assert traced.linears == 4
