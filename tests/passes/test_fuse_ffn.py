"""FFNs that stand in parallel become one wide FFN, exactly; those that differ in more than weights are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfuse.packing.expressions import PACK
from fxfuse.packing.strategy import Weights
from fxfuse.passes import PassReport, fuse_ffn, parallelize, simplify
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
    Traced,
    assert_no_dead_nodes,
    assert_same,
    on_both_roads,
    on_every_road,
    ready,
    trace,
    vectors,
)
from tests.models.bodies import FFNBody
from tests.models.decoders import Side
from tests.models.norms import make_norm


class Sides(nn.Module):
    """Several such sums, one behind the other: ``groups.0.layers.1.body`` is the second branch of the first."""

    def __init__(self, groups: Iterable[list[nn.Module]]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(Side(*bodies) for bodies in groups)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        for group in self.groups:
            h = group.sum(h)
        return h


def names(count: int) -> tuple[str, ...]:
    return tuple(f"layers.{index}.body" for index in range(count))


@cache
@torch.no_grad()
def simplified(model: nn.Module, road: str) -> tuple[Traced, Tensor]:
    """The simplified graph of a model, and what the model computes."""
    ready(model)
    traced = trace(model, vectors(), road=road)
    simplify(traced.gm)
    return traced, model(vectors())


def fused(model: nn.Module, road: str, weights: Weights = "copy", linears: int | None = 2) -> tuple[Traced, PassReport]:
    """The graph, simplified and fused; it computes what the model does, in as many linears as said."""
    traced, expected = simplified(model, road)
    traced = traced.copy()
    report = fuse_ffn(traced.gm, weights=weights)
    assert_same(traced(), expected)
    assert_no_dead_nodes(traced.gm)
    traced.gm.graph.lint()
    if linears is not None:
        assert traced.linears == linears
    return traced, report


def packs(traced: Traced) -> dict[str, list[str]]:
    """Each packed weight, and the ops of what it is made of: ``weight`` for a bare one."""
    found = {}
    for node in traced.gm.graph.nodes:
        if PACK in node.meta:
            parts = node.args[0] if node.target is torch.cat else [node]
            found[node.meta[PACK]] = ["weight" if p.op in ("placeholder", "get_attr") else p.name for p in parts]
    return found


WEIGHTS = pytest.mark.parametrize("weights", ["copy", "share"])

# Branches that are one wide FFN, however differently they are written.
ALIKE: dict[str, Callable[[], list[nn.Module]]] = {
    "two": lambda: [SwiGLU(), SwiGLU()],
    "four": lambda: [SwiGLU(), SwiGLU(), SwiGLU(), SwiGLU()],
    "either order of the product": lambda: [SwiGLU(), SwiGLU(up_first=True), SwiGLU()],
    "whatever the matrices are called": lambda: [SwiGLU(), Renamed(), PackedSwiGLU()],
    "all biases": lambda: [SwiGLU(bias=True), SwiGLU(bias=True)],
    "some biases": lambda: [SwiGLU(bias=True), SwiGLU(), SwiGLU(bias=True)],
    "one bias of three": lambda: [
        FFNBody(s.FFN(HIDDEN, bias=(which == 0, which == 1, which == 2)), WIDTH) for which in range(3)
    ],
    "packed": lambda: [PackedSwiGLU(), PackedSwiGLU()],
    "packed beside separate": lambda: [PackedSwiGLU(), SwiGLU(), PackedSwiGLU(bias=True)],
    "every layout": lambda: [
        FFNBody(s.FFN(HIDDEN, layout=layout), WIDTH)
        for layout in ("separate", "gate_up_chunk", "up_gate_chunk", "gate_up_split", "gate_up_slice", "interleaved")
    ],
    "flattened rows beside others": lambda: [FFNBody(s.FFN(HIDDEN, flat=True), WIDTH), SwiGLU()],
    "other gains": lambda: [Layer(SwiGLU(), make_norm(s.Norm("rms_hf"), WIDTH)) for _ in range(3)],
    "norms as one call": lambda: [Layer(SwiGLU(), make_norm(s.Norm("rms_functional"), WIDTH)) for _ in range(3)],
    "a call with and without a gain": lambda: [
        Layer(SwiGLU()), Layer(SwiGLU(), nn.RMSNorm(WIDTH, eps=1e-5, elementwise_affine=False))
    ],
    "gains of 1 + w": lambda: [Layer(SwiGLU(), make_norm(s.Norm("rms_gain_plus_one"), WIDTH)) for _ in range(2)],
    "layer norms": lambda: [Layer(SwiGLU(bias=True), nn.LayerNorm(WIDTH)) for _ in range(3)],
    "layer norms with some biases": lambda: [
        Layer(SwiGLU(), nn.LayerNorm(WIDTH, bias=False)), Layer(SwiGLU(), nn.LayerNorm(WIDTH)),
        Layer(PackedSwiGLU(), nn.LayerNorm(WIDTH, elementwise_affine=False)),
    ],
    "no norm": lambda: [Layer(SwiGLU(), nn.Identity()), Layer(SwiGLU(), nn.Identity())],
    "plain": lambda: [MLP(), MLP()],
    "plain relu": lambda: [MLP(activation=torch.relu), MLP(activation=F.relu)],
    "no activation": lambda: [Bilinear(), Bilinear()],
    "weights as [in, out]": lambda: [Transposed(), Transposed()],
    "one scale": lambda: [Layer(SwiGLU(), add=lambda h, f: h + f * 0.22) for _ in range(2)],
    "gains on the output": lambda: [Gained(WIDTH), Gained(), SwiGLU(bias=True), Gained(1, 1, WIDTH)],
    "numbers in the activation": lambda: [Sloped(1), Sloped(HIDDEN), Sloped()],
    "scales that differ": lambda: [
        Layer(SwiGLU(bias=True), add=lambda h, f: h + f * 0.22), Layer(SwiGLU(), add=lambda h, f: h - f),
        Layer(SwiGLU(bias=True), add=lambda h, f: torch.add(h, f, alpha=3)),
    ],
}  # fmt: skip


class Gained(SwiGLU):
    """A gain on the output, of whatever shape, and a bias before it."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(bias=True)
        self.gamma = nn.Parameter(torch.ones(sizes))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * super().forward(x)


class Sloped(MLP):
    """An activation with two numbers of its own, one number each or one for each unit."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.slope, self.start = nn.Parameter(torch.ones(sizes)), nn.Parameter(torch.ones(sizes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.slope.dim() == 1:
            return self.down(torch.where(x > 0, x, self.slope * x) + self.start)
        return self.down(self.start + torch.where(x > 0, x, x * self.slope))


class Renamed(SwiGLU):
    """What is called the gate is the up, and the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x) * F.silu(self.up(x)))


class Bilinear(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x) * self.up(x))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.empty(WIDTH, HIDDEN)), nn.Parameter(torch.empty(HIDDEN, WIDTH))
        self.b1, self.b2 = nn.Parameter(torch.empty(HIDDEN)), nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(torch.addmm(self.b1, x.view(-1, WIDTH), self.w1)).square()
        return torch.addmm(self.b2, hidden, self.w2).view(x.shape)


@cache
def alike() -> Sides:
    return Sides(make() for make in ALIKE.values())


@cache
def unlike() -> Sides:
    return Sides(make() for make, _ in UNLIKE.values())


@WEIGHTS
@on_both_roads
def test_ffns_that_differ_in_weights_become_one(road: str, weights: Weights) -> None:
    model = alike()

    traced, report = fused(model, road, weights, linears=0 if weights == "share" else 2 * len(model.groups))

    assert not report.refused
    assert len(report.done) == len(model.groups)
    for index, (group, edit, each) in enumerate(zip(model.groups, report.done, traced.stream.sums, strict=True)):
        members = [f"groups.{index}.{name}" for name in names(len(group.layers))]
        assert edit.branches == tuple(members)
        assert edit.detail == f"one FFN of width {HIDDEN * len(members)}"
        assert [branch.name for branch in each.branches] == [" + ".join(members)]


@on_every_road
def test_ffns_of_other_widths_become_one(road: str) -> None:
    _, report = fused(Side(SwiGLU(5), SwiGLU(11, bias=True), PackedSwiGLU(7)), road)

    assert [edit.detail for edit in report.done] == ["one FFN of width 23"]


@on_both_roads
def test_sharing_takes_ffns_of_one_width_only(road: str) -> None:
    _, report = fused(Side(SwiGLU(5), SwiGLU(7), SwiGLU(5)), road, "share", linears=3)

    assert [edit.branches for edit in report.done] == [("layers.0.body", "layers.2.body")]
    (refused,) = report.refused
    assert refused.branches == ("layers.1.body",)
    assert "width differs" in refused.detail


@on_both_roads
def test_sharing_packs_nothing_but_whole_weights(road: str) -> None:
    traced, _ = fused(alike(), road, "share", linears=0)

    for name in ("two", "packed", "packed beside separate", "other gains", "layer norms", "plain", "one scale"):
        own = f" of groups.{list(ALIKE).index(name)}."
        made = {what.split(own)[0]: parts for what, parts in packs(traced).items() if own in what}
        assert {*made["projections"], *made["down"]} == {"weight"}, name
        if name in ("layer norms", "plain"):
            assert set(made["projection bias"]) == {"weight"}, name


@on_both_roads
def test_every_concatenation_of_weights_is_marked_as_a_pack(road: str) -> None:
    for weights in get_args(Weights):
        traced, _ = fused(Side(*ALIKE["scales that differ"]()), road, weights, linears=None)

        cats = [node for node in traced.gm.graph.nodes if node.target is torch.cat]
        assert len(cats) == 3  # projections, their biases, down
        assert all(PACK in node.meta for node in cats)
        assert len(packs(traced)) == 4  # and the sum of the down biases


# Two branches that are no wide FFN, and the words that must say why.
UNLIKE: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "another eps": (
        lambda: [Layer(SwiGLU(), nn.RMSNorm(WIDTH, eps=eps)) for eps in (1e-5, 1e-6)],
        "its norm has eps={eps}, and that of groups.{group}.layers.{other}.body eps={other_eps}",
    ),
    "another eps by hand": (
        lambda: [Layer(SwiGLU(), make_norm(s.Norm("rms_hf", eps), WIDTH)) for eps in (1e-5, 1e-6)],
        "its norm has eps={eps}, and that of groups.{group}.layers.{other}.body eps={other_eps}",
    ),
    "no eps given beside one": (
        lambda: [Layer(SwiGLU(), nn.RMSNorm(WIDTH, eps=eps)) for eps in (None, 1e-5)],
        "its norm has eps=",
    ),
    "another kind of norm": (
        lambda: [Layer(SwiGLU(), nn.RMSNorm(WIDTH, eps=1e-5)), Layer(SwiGLU(), nn.LayerNorm(WIDTH))],
        "it reads a {kind}, and groups.{group}.layers.{other}.body reads a {other_kind}",
    ),
    "a norm beside none": (
        lambda: [Layer(SwiGLU()), Layer(SwiGLU(), nn.Identity())],
        "the stream without a norm",
    ),
    "a norm that is one call beside one that is written out": (
        lambda: [Layer(SwiGLU(), make_norm(s.Norm(kind, 1e-5), WIDTH)) for kind in ("rms_hf", "rms_module")],
        "an rms_norm written out",
    ),
    "learned numbers inside of what is no norm": (
        lambda: [Layer(SwiGLU(), Squashed()), Layer(SwiGLU(), Squashed())],
        "with a weight of its own inside (groups.{group}.layers.{index}.norm.alpha), which cannot be folded into its "
        "projections as a gain can, so it cannot be wide with groups.{group}.layers.{other}.body",
    ),
    "other numbers inside of what is no norm": (
        lambda: [Layer(SwiGLU(), Squashed(power)) for power in (2, 4)],
        "with exponent=",
    ),
    "functions in the place of a norm": (
        lambda: [Layer(SwiGLU(), nn.Tanh()), Layer(SwiGLU(), nn.Sigmoid())],
        "and groups.{group}.layers.{other}.body reads ",
    ),
    "another activation": (
        lambda: [SwiGLU(), FFNBody(s.FFN(activation="gelu"), WIDTH)],
        "its activation differs from that of groups.{group}.layers.{other}.body",
    ),
    "another approximation": (
        lambda: [FFNBody(s.FFN(activation=kind), WIDTH) for kind in ("gelu", "gelu_tanh")],
        "its activation differs",
    ),
    "an inner multiplier": (
        lambda: [FFNBody(s.FFN(gate_scale=scale), WIDTH) for scale in (None, 0.5)],
        "its activation differs",
    ),
    "another activation of the same units": (lambda: [SwiGLU(), GatedByTanh()], "its activation differs"),
    "gated beside plain": (lambda: [SwiGLU(), MLP(activation=F.silu)], "its activation differs"),
    "another dtype": (lambda: [SwiGLU(), Narrow()], "it computes in other dtypes than groups."),
    "a number in the activation beside a literal": (
        lambda: [Sloped(1), MLP(activation=lambda x: torch.where(x > 0, x, 0.1 * x) + 0.2)],
        "its activation differs",
    ),
    "numbers used elsewhere in the activation": (lambda: [Sloped(1), Started()], "its activation differs"),
}


class Squashed(nn.Module):
    """DyT: ``gain * tanh(alpha * x) + shift`` (arXiv 2503.10622), and a neighbour of it."""

    def __init__(self, power: int | None = None) -> None:
        super().__init__()
        self.alpha, self.power = nn.Parameter(torch.ones(1)), power
        self.gain, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.alpha * x if self.power is None else x**self.power
        return self.gain * torch.tanh(x) + self.shift


class Started(Sloped):
    """The same numbers and ops, put together otherwise."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(torch.where(x > 0, self.slope * x, x) + self.start)


class GatedByTanh(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.gate(x)) * self.up(x))


class Narrow(SwiGLU):
    """Computes in float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(lambda t: fn(t).to(torch.float32), recurse)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).double()


@WEIGHTS
@on_both_roads
def test_ffns_that_differ_in_more_are_refused_with_the_difference(road: str, weights: Weights) -> None:
    _, report = fused(unlike(), road, weights, linears=None)

    assert not report.done
    for edit in report.refused:
        _, group, _, index, _ = edit.branches[0].split(".")
        words = list(UNLIKE.values())[int(group)][1]
        told = {
            "group": group,
            "index": index,
            "other": 1 - int(index),
            "eps": (1e-5, 1e-6)[int(index)],
            "other_eps": (1e-6, 1e-5)[int(index)],
            "kind": ("rms_norm", "layer_norm")[int(index)],
            "other_kind": ("layer_norm", "rms_norm")[int(index)],
        }
        assert words.format(**told) in edit.detail
    assert {edit.branches[0].split(".")[1] for edit in report.refused} == set(map(str, range(len(UNLIKE))))


@on_both_roads
def test_those_that_are_alike_fuse_past_those_that_are_not(road: str) -> None:
    bodies = [SwiGLU(5), MLP(), Layer(SwiGLU(), nn.LayerNorm(WIDTH)), SwiGLU(7), Attention(), MLP()]

    traced, report = fused(Side(*bodies), road, linears=2 + 2 + 3 + 4)

    assert [edit.branches for edit in report.done] == [
        ("layers.0.body", "layers.3.body"),
        ("layers.1.body", "layers.5.body"),
    ]
    assert [edit.branches for edit in report.refused] == [("layers.2.body",)]
    assert len(traced.stream.branches) == 4


@on_both_roads
def test_what_the_plan_made_parallel_becomes_wide(road: str) -> None:
    model = ready(Decoder())
    traced = trace(model, vectors(), road=road)
    parallelize(traced.gm, [("layers.0.mlp", "layers.1.mlp")])
    before = traced()

    report = fuse_ffn(traced.gm)

    assert [edit.branches for edit in report.done] == [("layers.0.mlp", "layers.1.mlp")]
    assert_same(traced(), before)
    assert traced.linears == 4 + 2 + 4 + 1


@on_both_roads
def test_ffns_of_private_sequences_read_other_points_and_stay_apart(road: str) -> None:
    model = ready(Decoder())
    traced = trace(model, vectors(), road=road)
    parallelize(traced.gm, [(("layers.0.attn", "layers.0.mlp"), ("layers.1.attn", "layers.1.mlp"))])
    before = traced()

    report = fuse_ffn(traced.gm)

    assert not report.done
    assert_same(traced(), before)
    assert traced.linears == 2 * 7 + 1


class Bordered(Side):
    """The branches in an autocast region, their sum outside of it, or in a region of its own."""

    def __init__(self, inside: bool) -> None:
        super().__init__(SwiGLU(), SwiGLU())
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            one, other = (layer.branch(h) for layer in self.layers)
            if self.inside:
                return h + one + other
        return h + one + other


@pytest.mark.parametrize("inside", [True, False], ids=["the sum inside", "the sum outside"])
def test_nothing_leaves_its_autocast_region(inside: bool) -> None:
    model, x = ready(Bordered(inside)).float(), vectors().float()
    traced = trace(model, x)
    with torch.no_grad():
        expected = model(x)

    report = fuse_ffn(traced.gm)

    assert len(report.done) == inside
    assert [("autocast" in edit.detail) for edit in report.refused] == [] if inside else [True, True]
    torch.testing.assert_close(traced()[0], expected, rtol=0, atol=0.1 if inside else 0)


@on_both_roads
def test_several_sums_of_one_stream_are_fused(road: str) -> None:
    class Pairs(Stream):
        def forward(self, x: Tensor) -> Tensor:
            h = self.start(x)
            for index in (0, 2):
                h = h + self.branch(index, h) + self.branch(index + 1, h)
            return h

    _, report = fused(Pairs(SwiGLU(5), SwiGLU(7), MLP(), MLP()), road, linears=4)

    assert [edit.branches for edit in report.done] == [names(2), ("layers.2.body", "layers.3.body")]


@on_both_roads
def test_a_single_ffn_has_nothing_to_fuse_with(road: str) -> None:
    _, report = fused(Stream(SwiGLU(), SwiGLU()), road, linears=6)

    assert not report.done
    assert not report.refused


@on_both_roads
def test_a_gain_that_the_input_decides_stays_where_it_is(road: str) -> None:
    """Adaptive norms: folding such a gain into a weight would freeze it."""

    class Adaptive(Side):
        def __init__(self) -> None:
            super().__init__(SwiGLU(), SwiGLU())
            self.condition = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            h = self.start(x)
            gain = self.condition(x[0, 0])
            one, other = (layer.body for layer in self.layers)
            a = one(F.layer_norm(h, (WIDTH,), gain))
            return h + a + other(F.layer_norm(h, (WIDTH,), 2 * gain))

    traced, report = fused(Adaptive(), road, linears=None)

    assert not report.done
    assert not packs(traced)


@on_both_roads
def test_a_gain_of_three_dimensions_is_folded_like_a_vector(road: str) -> None:
    class Tall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(1, 1, WIDTH)), nn.Parameter(torch.ones(1, 1, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, (WIDTH,)) * self.weight + self.bias

    _, report = fused(Side(*(Layer(SwiGLU(), Tall()) for _ in range(2))), road)

    assert [edit.branches for edit in report.done] == [names(2)]


@on_both_roads
def test_a_value_written_between_the_ffns_and_their_sum_is_not_read_late(road: str) -> None:
    class Written(Stream):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.start(x)
            parts = [layer.branch(h) for layer in self.layers]
            start = h * 1.0
            h.mul_(3)
            return start + parts[0] + parts[1] + torch.tanh(h), h

    fused(Written(*(Layer(SwiGLU(), nn.Identity()) for _ in range(2))), road, linears=None)


@on_both_roads
def test_weights_that_two_ffns_share_are_used_twice(road: str) -> None:
    model = Side(SwiGLU(), SwiGLU())
    model.layers[1].body.gate = model.layers[0].body.gate

    _, report = fused(model, road)

    assert len(report.done) == 1


@on_both_roads
def test_a_fused_graph_has_nothing_to_fuse(road: str) -> None:
    traced, _ = fused(Side(SwiGLU(), SwiGLU()), road)
    before = traced.gm.code

    assert not fuse_ffn(traced.gm)
    assert traced.gm.code == before


def test_gradients_flow_to_the_models_own_weights() -> None:
    model = ready(Side(SwiGLU(bias=True), PackedSwiGLU()))
    x = vectors()
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for weights in get_args(Weights):
        traced = trace(model, x)
        fuse_ffn(traced.gm, weights=weights)
        loss = traced.gm(*traced.inputs)[0].square().sum()

        got = torch.autograd.grad(loss, list(model.parameters()))

        assert_same(got, expected)


class SingleNorm(nn.Module):
    """Computes in float32 in any model, as Gemma's and Cohere's do; the gain is of the model's dtype."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.weight, self.inside = nn.Parameter(torch.ones(WIDTH)), inside

    def forward(self, x: Tensor) -> Tensor:
        if self.inside:
            return (F.rms_norm(x.float(), (WIDTH,)) * self.weight.float()).type_as(x)
        return F.rms_norm(x.float(), (WIDTH,)).type_as(x) * self.weight


@on_both_roads
@pytest.mark.parametrize("inside", [True, False], ids=["the gain in float32", "the gain in float64"])
def test_a_gain_is_folded_only_where_that_spares_no_rounding(inside: bool, road: str) -> None:
    """``fused`` compares to 1e-8; a folded gain would differ by the rounding of float32."""
    _, report = fused(Side(*(Layer(SwiGLU(), SingleNorm(inside)) for _ in range(2))), road, linears=None)

    assert len(report.done) == (0 if inside else 1)
    assert [edit.detail for edit in report.refused] == [
        "its norm applies its gain in float32 and its projections read float64: to fold it would spare that rounding"
    ] * (2 if inside else 0)


class Rounded(nn.RMSNorm):
    """Its output is rounded further than the dtype that it is read in, as for a quantised product."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(WIDTH)
        self.rounding = dtype

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(self.rounding).to(x.dtype)


@on_both_roads
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_a_gain_under_a_rounding_cast_is_not_folded(dtype: torch.dtype, road: str) -> None:
    """The rounding of a product with the gain is not the product of the rounding with it."""
    _, report = fused(Side(*(Layer(SwiGLU(), Rounded(dtype)) for _ in range(2))), road, linears=None)

    assert not report.done
    assert all("norm.weight), which cannot be folded into its projections" in edit.detail for edit in report.refused)


@torch.no_grad()
def test_a_gain_in_the_dtype_that_is_read_or_a_wider_one_is_folded() -> None:
    model = ready(Side(*(Layer(SwiGLU(), SingleNorm(True)) for _ in range(2)))).bfloat16()
    traced = trace(model, vectors().bfloat16())

    assert len(fuse_ffn(traced.gm).done) == 1
