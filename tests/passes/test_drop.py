"""A dropped branch contributes nothing, what only it needed is gone, and what others need of it stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfuse.passes import apply_plan, drop
from fxfuse.plan import Plan
from tests.models.blocks import (
    WIDTH,
    Attention,
    Block,
    Decoder,
    Layer,
    Stream,
    SwiGLU,
    assert_no_dead_nodes,
    assert_refused,
    assert_same,
    on_both_roads,
    on_every_road,
    ready,
    trace,
    vectors,
)
from tests.models.decoders import (
    Cached,
    CrossLayer,
    IndexedExperts,
    InPlace,
    KeyOutputs,
    Parallel,
    Tapped,
    Tokens,
    decoder,
    traced_decoder,
)

BRANCHES = ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"]


def without(model: Decoder, x: Tensor, names: Collection[str]) -> Tensor:
    """The decoder's own modules, run by hand."""
    h = x * 1.5
    for index in range(model.depth):
        for part in ("attn", "mlp"):
            if f"layers.{index}.{part}" not in names:
                h = h + getattr(model, part)(index, h)
    return model.head(model.norm(h))


@pytest.mark.parametrize("names", [c for n in (1, 2, 4) for c in itertools.combinations(BRANCHES, n)], ids=str)
def test_dropping_is_the_model_that_skips_the_branches(names: tuple[str, ...]) -> None:
    traced = traced_decoder("export").copy()

    report = drop(traced.gm, names)

    assert {name for edit in report.done for name in edit.branches} == set(names)
    assert [edit.action for edit in report.done] == ["dropped"] * len(names)
    assert not report.refused
    assert_same(traced(), without(decoder(), vectors(), names))
    assert_no_dead_nodes(traced.gm)
    assert traced.linears == 1 + sum(0 if name in names else 4 if "attn" in name else 3 for name in BRANCHES)


@on_every_road
def test_dropping_works_on_every_road(road: str) -> None:
    traced = traced_decoder(road).copy()

    drop(traced.gm, ["layers.0.mlp", "layers.1.attn"])

    assert_same(traced(), without(decoder(), vectors(), {"layers.0.mlp", "layers.1.attn"}))
    assert_no_dead_nodes(traced.gm)


def test_dropping_nothing_changes_nothing() -> None:
    traced = traced_decoder("export").copy()
    before = traced.gm.code

    assert not drop(traced.gm, [])
    assert traced.gm.code == before


@on_both_roads
def test_an_unknown_name_is_refused_with_the_nearest(road: str) -> None:
    traced = traced_decoder(road).copy()

    assert_refused(
        traced,
        lambda gm: drop(gm, ["layers.0.attn", "layers.1.attention"]),
        r"'layers\.1\.attention' is no branch of this graph; nearest: layers\.1\.attn",
    )


def test_a_graph_without_streams_has_nothing_to_drop() -> None:
    traced = trace(nn.Linear(WIDTH, WIDTH).double(), vectors(), road="export")

    assert_refused(traced, lambda gm: drop(gm, ["mlp"]), "'mlp' is no branch of this graph; .*no residual branches")


@on_both_roads
def test_of_two_branches_in_one_sum_the_other_stays_with_the_norm_they_share(road: str) -> None:
    model = ready(Parallel())
    traced = trace(model, vectors(), road=road)

    drop(traced.gm, ["layers.0.attn", "layers.1.mlp"])

    h = vectors() * 1.5
    first, second = model.layers
    h = h + first.mlp(first.attn_norm(h))
    h = h + 0.5 * second.attn(second.attn_norm(h))
    assert_same(traced(), h)
    assert_no_dead_nodes(traced.gm)


@on_both_roads
def test_taps_see_the_stream_as_the_drop_leaves_it(road: str) -> None:
    model = ready(Tapped())
    traced = trace(model, vectors(), road=road)

    drop(traced.gm, ["layers.0.mlp"])

    h0 = vectors() * 1.5
    h1 = h0 + model.attn(0, h0)
    h3 = h1 + model.attn(1, h1)
    h4 = h3 + model.mlp(1, h3)
    assert_same(traced(), (h4, h0, h1, h1.mean(1), h3, h4.mean(1)))


@on_both_roads
def test_keys_that_the_model_returns_are_kept_and_reported(road: str) -> None:
    model = ready(KeyOutputs())
    traced = trace(model, vectors(), road=road)

    report = drop(traced.gm, ["layers.0.attn"])

    (edit,) = report.done
    assert edit.detail.endswith("of its nodes serve others and stay")
    h = vectors() * 1.5
    kept = model.layers[0].attn.key_value(model.layers[0].attn_norm(h))
    h = h + model.mlp(0, h)
    x = model.layers[1].attn_norm(h)
    rest = model.layers[1].attn.key_value(x)
    h = h + model.layers[1].attn(x)
    h = h + model.mlp(1, h)
    assert_same(traced(), (h, *kept, *rest))
    assert traced.linears == 2 + 4 + 6
    assert_no_dead_nodes(traced.gm)


@on_both_roads
def test_a_layer_that_reads_the_keys_of_a_dropped_one_keeps_reading_them(road: str) -> None:
    model = ready(CrossLayer())
    traced = trace(model, vectors(), road=road)

    drop(traced.gm, ["layers.0.attn"])

    h = vectors() * 1.5
    key, value = model.layers[0].attn.key_value(model.layers[0].attn_norm(h))
    h = h + model.mlp(0, h)
    h = h + model.layers[1].attn.attend(model.layers[1].attn_norm(h), key, value)
    h = h + model.mlp(1, h)
    own = model.layers[2].attn
    x = model.layers[2].attn_norm(h)
    k, v = own.key_value(x)
    h = h + own.attend(x, k, 0.5 * v + 0.5 * value)
    assert_same(traced(), h + model.mlp(2, h))


@on_both_roads
def test_what_a_dropped_attention_writes_to_its_cache_it_still_writes(road: str) -> None:
    model = ready(Cached())
    traced = trace(model, vectors(), torch.arange(3), road=road)

    report = apply_plan(traced.gm, Plan(drop=["layers.0.attn"])).meta["fxfuse_reports"][1]

    (edit,) = report.done
    assert "serve others and stay" in edit.detail
    assert traced.count("index_copy_") == 6
    expected, keys = model.by_hand(vectors(), drop={0})
    assert_same(traced(), expected)
    buffers = dict(traced.gm.named_buffers()) or dict(model.named_buffers())
    for index, key in enumerate(keys):
        torch.testing.assert_close(buffers[f"layers.{index}.attn.keys"][:, :, :3], key)


@on_both_roads
@pytest.mark.parametrize("form", ["h += f", "h.add_(f)", "old name", "h -= f"])
def test_sums_in_place_are_dropped_without_a_trace(road: str, form: str) -> None:
    model = ready(InPlace(form))
    traced = trace(model, vectors(), road=road)

    drop(traced.gm, ["layers.1.body"])

    h = vectors() * 1.5
    sign = -1 if form == "h -= f" else 1
    h = h + sign * model.branch(0, h)
    assert_same(traced(), h + sign * model.branch(2, h))


def on_the_input(m: nn.Module, x: Tensor) -> Tensor:
    for layer in m.layers:
        x.add_(layer.branch(x))
    return x * 2


def seen_through_a_view(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h = x * 1.5
    view = h.view(-1, WIDTH)
    for layer in m.layers:
        h += layer.branch(h)
    return h, view * 2


def into_a_buffer(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h, buffer = x * 1.5, torch.zeros_like(x)
    made = torch.add(h, m.layers[1].branch(h), out=buffer)
    return made * 1, buffer * 2


class Written(Stream):
    """Three FFNs, and a forward that writes to memory in some way of its own."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__(SwiGLU(), SwiGLU(), SwiGLU())
        self.function = forward

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


@on_both_roads
@pytest.mark.parametrize("forward", [on_the_input, seen_through_a_view, into_a_buffer], ids=lambda f: f.__name__)
def test_a_sum_written_where_others_see_it_is_refused(
    road: str, forward: Callable[[nn.Module, Tensor], object]
) -> None:
    traced = trace(ready(Written(forward)), vectors(), road=road)
    fresh = [value.clone() if isinstance(value, Tensor) else value for value in traced.inputs]
    traced.inputs = tuple(fresh)

    with pytest.raises(Exception, match=r"'layers\.1\.body': added to the stream in place"):
        drop(traced.gm, ["layers.1.body"])


def scaled_later(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The point after the dropped branch is written in place; the point before it is an output."""
    h = x * 1.5
    h1 = h + m.layers[0].branch(h)
    h1.mul_(2)
    return h1 + m.layers[1].branch(h1), h


def scaled_before(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The point before the dropped branch is written in place after the sum."""
    h = x * 1.5
    h1 = h + m.layers[0].branch(h)
    view = h.view(-1)
    view.mul_(2)
    return h1 + m.layers[1].branch(h1), h


@on_both_roads
@pytest.mark.parametrize("forward", [scaled_later, scaled_before], ids=lambda f: f.__name__)
def test_two_points_that_were_two_memories_stay_two(road: str, forward: Callable[[nn.Module, Tensor], object]) -> None:
    model = ready(Written(forward))
    traced = trace(model, vectors(), road=road)

    drop(traced.gm, ["layers.0.body"])

    h = vectors() * 1.5
    h1, kept = (2 * h, h) if forward is scaled_later else (h, 2 * h)
    assert_same(traced(), (h1 + model.branch(1, h1), kept))


class WritesInside(SwiGLU):
    """An activation in place: a write that nobody outside sees."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        F.silu(gate, inplace=True)
        return self.down(gate.mul_(self.up(x)))


@on_both_roads
def test_writes_inside_a_dropped_branch_go_with_it(road: str) -> None:
    model = ready(Stream(SwiGLU(), WritesInside(), IndexedExperts(), SwiGLU()))
    traced = trace(model, vectors(), road=road)

    report = drop(traced.gm, ["layers.1.body", "layers.2.body"])

    h = vectors() * 1.5
    h = h + model.branch(0, h)
    assert_same(traced(), h + model.branch(3, h))
    assert traced.linears == 6
    assert traced.count("silu", "index_add", "mul_") == 2
    assert [edit.detail for edit in report.done] == ["", ""]


@on_both_roads
def test_what_else_a_sum_adds_stays(road: str) -> None:
    class Extra(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            h, extra = x * 1.5, torch.tanh(x)
            for layer in self.layers:
                h = h + layer.mlp(layer.mlp_norm(h)) + 0.3 * extra
            return h

    model = ready(Extra())
    traced = trace(model, vectors(), road=road)

    drop(traced.gm, ["layers.0.mlp"])

    h = vectors() * 1.5 + 0.3 * torch.tanh(vectors())
    assert_same(traced(), h + model.mlp(1, h) + 0.3 * torch.tanh(vectors()))


@on_both_roads
def test_a_long_skip_reads_the_point_as_the_drop_leaves_it(road: str) -> None:
    class Skip(Decoder):
        depth = 3

        def forward(self, x: Tensor) -> Tensor:
            h0 = x * 1.5
            h1 = h0 + self.mlp(0, h0)
            h2 = h1 + self.mlp(1, h1)
            return h2 + self.mlp(2, h2) + h1

    model = ready(Skip())
    traced = trace(model, vectors(), road=road)

    drop(traced.gm, ["layers.0.mlp", "layers.2.mlp"])

    h = vectors() * 1.5
    assert_same(traced(), h + model.mlp(1, h) + h)


@on_both_roads
def test_the_sum_of_embeddings_stays(road: str) -> None:
    model = ready(Tokens())
    ids = torch.arange(6).view(2, 3)
    traced = trace(model, ids, road=road)

    drop(traced.gm, ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"])

    assert_same(traced(), model.embed(ids))


@on_both_roads
def test_a_stream_that_a_branch_widened_stays_wide(road: str) -> None:
    """bfloat16 + float32 is float32; without the branch, so it remains."""

    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(SwiGLU()), Layer(SwiGLU())])

        def forward(self, x: Tensor) -> Tensor:
            h = (x * 1.5).to(torch.float32)
            h = h + self.layers[0].body(h.double())
            return h + self.layers[1].body(h)

    model = ready(Widening())
    traced = trace(model, vectors(), road=road)

    drop(traced.gm, ["layers.0.body"])

    h = (vectors() * 1.5).float().double()
    (made,) = traced()
    assert made.dtype is torch.float64
    assert_same((made,), h + model.layers[1].body(h))


@on_both_roads
def test_a_branch_of_an_encoder_leaves_the_decoder_reading_what_is_left(road: str) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.cross = Block(), Block(), Attention()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            memory = self.encoder(x * 1.5)
            h = y * 1.5
            h = h + self.cross.attend(h, *self.cross.key_value(memory), causal=False)
            return self.decoder(h)

    model = ready(Both())
    x, y = vectors(), vectors(seed=2)
    traced = trace(model, x, y, road=road)

    drop(traced.gm, ["encoder.mlp", "decoder.attn"])

    memory = x * 1.5
    memory = memory + model.encoder.attn(model.encoder.attn_norm(memory))
    h = y * 1.5
    h = h + model.cross.attend(h, *model.cross.key_value(memory), causal=False)
    assert_same(traced(), h + model.decoder.mlp(model.decoder.mlp_norm(h)))
