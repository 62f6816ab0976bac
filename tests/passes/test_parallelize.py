"""A group reads the stream where its first branch stands and is added there; what cannot stand there is an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from fxfuse.passes import apply_plan, drop, parallelize
from fxfuse.plan import Group, Plan
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
    InPlace,
    LateKeys,
    Parallel,
    SharedCache,
    Tapped,
    deep,
    traced_deep,
)


def a(index: int) -> str:
    return f"layers.{index}.attn"


def m(index: int) -> str:
    return f"layers.{index}.mlp"


def finish(model: Decoder, h: Tensor) -> Tensor:
    return model.head(model.norm(h))


def ffn_fusion(d: Decoder, h: Tensor) -> Tensor:
    h = h + d.attn(0, h)
    h = h + d.mlp(0, h) + d.mlp(1, h) + d.mlp(2, h)
    h = h + d.attn(1, h)
    return h + d.attn(2, h)


def layer_pairs(d: Decoder, h: Tensor) -> Tensor:
    h = h + d.attn(0, h) + d.attn(1, h)
    h = h + d.mlp(0, h) + d.mlp(1, h)
    h = h + d.attn(2, h)
    return h + d.mlp(2, h)


def blocks(d: Decoder, h: Tensor) -> Tensor:
    def block(index: int, h: Tensor) -> Tensor:
        f = d.attn(index, h)
        return f + d.mlp(index, h + f)

    h = h + block(0, h) + block(1, h)
    h = h + d.attn(2, h)
    return h + d.mlp(2, h)


def far_apart(d: Decoder, h: Tensor) -> Tensor:
    h = h + d.attn(0, h) + d.mlp(2, h)
    h = h + d.mlp(0, h)
    h = h + d.attn(1, h)
    h = h + d.mlp(1, h)
    return h + d.attn(2, h)


def crossing(d: Decoder, h: Tensor) -> Tensor:
    h = h + d.attn(0, h) + d.mlp(1, h)
    h = h + d.mlp(0, h) + d.attn(2, h)
    h = h + d.attn(1, h)
    return h + d.mlp(2, h)


def turned_round(d: Decoder, h: Tensor) -> Tensor:
    f = d.mlp(1, h)
    f = f + d.attn(1, h + f)
    h = h + d.attn(0, h) + f
    h = h + d.mlp(0, h)
    h = h + d.attn(2, h)
    return h + d.mlp(2, h)


def mixed(d: Decoder, h: Tensor) -> Tensor:
    h = h + d.attn(0, h)
    f = d.attn(2, h)
    h = h + d.mlp(0, h) + f + d.mlp(2, h + f)
    h = h + d.attn(1, h)
    return h + d.mlp(1, h)


def everything(d: Decoder, h: Tensor) -> Tensor:
    return h + sum(d.attn(i, h) + d.mlp(i, h) for i in range(3))


GROUPS: dict[str, tuple[list[Group], Callable[[Decoder, Tensor], Tensor]]] = {
    "ffn fusion": ([(m(0), m(1), m(2))], ffn_fusion),
    "in any order": ([(m(2), m(0), m(1))], ffn_fusion),
    "layer pairs": ([(a(0), a(1)), (m(0), m(1))], layer_pairs),
    "layer pairs, groups turned round": ([(m(1), m(0)), (a(1), a(0))], layer_pairs),
    "full blocks": ([((a(0), m(0)), (a(1), m(1)))], blocks),
    "far apart": ([(a(0), m(2))], far_apart),
    "two groups that cross": ([(a(0), m(1)), (m(0), a(2))], crossing),
    "a sequence against the stream's order": ([(a(0), (m(1), a(1)))], turned_round),
    "a branch beside a sequence": ([(m(0), (a(2), m(2)))], mixed),
    "everything": ([(a(0), m(0), a(1), m(1), a(2), m(2))], everything),
}


@on_both_roads
@pytest.mark.parametrize("name", GROUPS)
def test_a_group_is_what_the_modules_say(name: str, road: str) -> None:
    groups, by_hand = GROUPS[name]
    traced = traced_deep(road).copy()
    before = traced.linears

    report = parallelize(traced.gm, groups)

    assert_same(traced(), finish(deep(), by_hand(deep(), vectors() * 1.5)))
    assert [edit.action for edit in report.done] == ["made parallel"] * len(groups)
    assert traced.linears == before
    assert_no_dead_nodes(traced.gm)


def test_parallel_branches_stand_in_one_sum_and_read_one_point() -> None:
    traced = traced_deep("strict export").copy()

    parallelize(traced.gm, [(m(0), m(1), m(2))])

    (each,) = [s for s in traced.stream.sums if len(s.branches) > 1]
    assert {branch.name for branch in each.branches} == {m(0), m(1), m(2)}
    assert {branch.read for branch in each.branches} == {each.stream.node}
    assert_same(traced(), finish(deep(), ffn_fusion(deep(), vectors() * 1.5)))


def test_no_groups_change_nothing() -> None:
    traced = traced_deep("export").copy()
    before = traced.gm.code

    assert not parallelize(traced.gm, [])
    assert traced.gm.code == before


@on_both_roads
def test_dropped_branches_between_leave_the_ffns_one_behind_the_other(road: str) -> None:
    """FFN Fusion as the paper does it."""
    traced = traced_deep(road).copy()

    drop(traced.gm, [a(1), a(2)])
    parallelize(traced.gm, [(m(0), m(1), m(2))])

    h = vectors() * 1.5
    h = h + deep().attn(0, h)
    assert_same(traced(), finish(deep(), h + sum(deep().mlp(i, h) for i in range(3))))


@on_both_roads
def test_taps_in_between_see_the_stream_as_the_groups_leave_it(road: str) -> None:
    model = ready(Tapped())
    traced = trace(model, vectors(), road=road)

    parallelize(traced.gm, [(m(0), m(1))])

    h0 = vectors() * 1.5
    h1 = h0 + model.attn(0, h0)
    h2 = h1 + model.mlp(0, h1) + model.mlp(1, h1)
    h3 = h2 + model.attn(1, h2)
    assert_same(traced(), (h3, h0, h1, h2.mean(1), h3, h3.mean(1)))


@on_both_roads
def test_branches_that_share_a_norm_part_with_a_copy_of_it(road: str) -> None:
    model = ready(Parallel())
    traced = trace(model, vectors(), road=road)

    parallelize(traced.gm, [(m(0), m(1))])

    h = vectors() * 1.5
    first, second = model.layers
    y = first.attn_norm(h)
    h = h + first.attn(y) + first.mlp(y) + 0.5 * second.mlp(second.attn_norm(h))
    assert_same(traced(), h + 0.5 * second.attn(second.attn_norm(h)))


@on_both_roads
@pytest.mark.parametrize("order", [(a, m), (m, a)], ids=["attention first", "ffn first"])
def test_parallel_attention_and_ffn_in_a_sequence_still_read_one_point(
    road: str, order: tuple[Callable[[int], str], ...]
) -> None:
    """What the model computes side by side, a private sequence does not put in a row, in whatever order it names it."""
    model = ready(Parallel())
    traced = trace(model, vectors(), road=road)

    parallelize(traced.gm, [tuple(tuple(name(index) for name in order) for index in range(2))])

    h = vectors() * 1.5
    first, second = model.layers
    y, z = first.attn_norm(h), second.attn_norm(h)
    assert_same(traced(), h + first.attn(y) + first.mlp(y) + 0.5 * (second.attn(z) + second.mlp(z)))


class Scaled(Stream):
    def __init__(self) -> None:
        scales = (0.22, -0.5, 2.0)
        super().__init__(*(Layer(SwiGLU(), add=lambda h, f, s=s: torch.add(h, f, alpha=s)) for s in scales))


@on_both_roads
def test_each_member_keeps_its_scale(road: str) -> None:
    model = ready(Scaled())
    traced = trace(model, vectors(), road=road)

    parallelize(traced.gm, [("layers.0.body", ("layers.1.body", "layers.2.body"))])

    h = vectors() * 1.5
    g = -0.5 * model.branch(1, h)
    assert_same(traced(), h + 0.22 * model.branch(0, h) + g + 2 * model.branch(2, h + g))


@on_both_roads
@pytest.mark.parametrize("start", [0, 1])
def test_a_sum_that_takes_the_stream_through_a_cast_keeps_it(road: str, start: int) -> None:
    """Mamba's residual_in_fp32: the branch reads the stream before the cast."""
    model = ready(Stream(*(Layer(SwiGLU(), add=lambda h, f: h.float() + f) for _ in range(4))))
    traced = trace(model, vectors(), road=road)

    parallelize(traced.gm, [[f"layers.{start + index}.body" for index in range(3)]])

    h = vectors() * 1.5
    for index in range(4):
        if index == start:
            h = h.float() + sum(model.branch(start + k, h) for k in range(3))
        elif start < index < start + 3:
            h = h.float().double()
        else:
            h = h.float() + model.branch(index, h)
    assert_same(traced(), h)


@on_both_roads
def test_a_narrow_branch_in_a_wide_stream_moves_with_its_casts(road: str) -> None:
    class Mixed(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            h = x * 1.5
            for index in range(2):
                h = h + self.wide(index, h)
            return h

        def wide(self, index: int, h: Tensor) -> Tensor:
            layer = self.layers[index]
            return layer.mlp(layer.mlp_norm(h.float())).to(h.dtype)

    model = ready(Mixed())
    for layer in model.layers:
        layer.float()
    traced = trace(model, vectors(), road=road)

    parallelize(traced.gm, [(m(0), m(1))])

    h = vectors() * 1.5
    assert_same(traced(), h + model.wide(0, h) + model.wide(1, h))


@on_both_roads
@pytest.mark.parametrize("form", ["h += f", "h.add_(f)", "old name", "h -= f"])
def test_sums_in_place_are_made_parallel_like_others(road: str, form: str) -> None:
    model = ready(InPlace(form))
    traced = trace(model, vectors(), road=road)

    parallelize(traced.gm, [("layers.1.body", "layers.2.body")])

    h, sign = vectors() * 1.5, -1 if form == "h -= f" else 1
    h = h + sign * model.branch(0, h)
    assert_same(traced(), h + sign * (model.branch(1, h) + model.branch(2, h)))


@on_both_roads
def test_a_layer_may_use_the_keys_of_one_that_stands_no_later_than_its_group(road: str) -> None:
    model = ready(CrossLayer())
    traced = trace(model, vectors(), road=road)

    parallelize(traced.gm, [(a(0), a(1)), (m(0), a(2))])

    h = vectors() * 1.5
    one, two, three = model.layers
    key, value = one.attn.key_value(one.attn_norm(h))
    h = h + one.attn(one.attn_norm(h)) + two.attn.attend(two.attn_norm(h), key, value)
    y = three.attn_norm(h)
    k, v = three.attn.key_value(y)
    h = h + model.mlp(0, h) + three.attn.attend(y, k, 0.5 * v + 0.5 * value)
    h = h + model.mlp(1, h)
    assert_same(traced(), h + model.mlp(2, h))


@on_every_road
def test_keys_made_later_than_the_place_of_the_group_are_refused_by_name(road: str) -> None:
    traced = trace(ready(LateKeys()), vectors(), road=road)

    assert_refused(
        traced,
        lambda gm: parallelize(gm, [(a(0), a(2))]),
        r"'layers\.2\.attn' needs \w+, a value that is made only after where its group stands",
    )


@on_both_roads
def test_a_value_residual_is_refused_only_before_it_is_made(road: str) -> None:
    class ValueResidual(Decoder):
        depth = 3

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[0](x * 1.5)
            _, value = self.layers[1].attn.key_value(self.layers[1].attn_norm(h))
            h = self.layers[1](h)
            y = self.layers[2].attn_norm(h)
            k, v = self.layers[2].attn.key_value(y)
            h = h + self.layers[2].attn.attend(y, k, 0.5 * v + 0.5 * value)
            return h + self.mlp(2, h)

    model = ready(ValueResidual())
    traced = trace(model, vectors(), road=road)

    assert_refused(traced, lambda gm: parallelize(gm, [(m(0), a(2))]), r"'layers\.2\.attn' needs")
    parallelize(traced.gm, [(a(1), a(2))])

    h = model.layers[0](vectors() * 1.5)
    y, z = model.layers[1].attn_norm(h), model.layers[2].attn_norm(h)
    _, value = model.layers[1].attn.key_value(y)
    k, v = model.layers[2].attn.key_value(z)
    h = h + model.layers[1].attn(y) + model.layers[2].attn.attend(z, k, 0.5 * v + 0.5 * value)
    h = h + model.mlp(1, h)
    assert_same(traced(), h + model.mlp(2, h))


@on_both_roads
def test_attentions_that_write_to_a_cache_move_with_their_writes(road: str) -> None:
    model = ready(Cached())
    traced = trace(model, vectors(), torch.arange(3), road=road)

    parallelize(traced.gm, [(a(0), a(1)), (m(0), m(1))])

    h = vectors() * 1.5
    f, first, _ = model.padded(0, h)
    g, second, _ = model.padded(1, h)
    h = h + f + g
    h = h + model.mlp(0, h) + model.mlp(1, h)
    f, third, _ = model.padded(2, h)
    h = h + f
    assert_same(traced(), h + model.mlp(2, h))
    buffers = dict(traced.gm.named_buffers()) or dict(model.named_buffers())
    for index, keys in enumerate((first, second, third)):
        torch.testing.assert_close(buffers[f"layers.{index}.attn.keys"], keys)


@on_both_roads
def test_layers_that_share_a_cache_keep_the_order_of_its_reads_and_writes(road: str) -> None:
    model = ready(SharedCache())
    traced = trace(model, vectors(), road=road)

    parallelize(traced.gm, [("layers.1.attn", "layers.2.attn")])

    h = vectors() * 1.5
    h = h + model.attn(0, h)
    assert_same(traced(), h + model.attn(1, h) + model.attn(2, h))


def test_a_read_of_another_layers_cache_before_it_is_written_is_refused() -> None:
    """Layer 2 attends to what layer 1 writes to its cache."""

    class Borrowing(Decoder):
        depth = 3

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.zeros(2, 2, 3, WIDTH // 2))

        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[0](x * 1.5)
            y = self.layers[1].attn_norm(h)
            key, value = self.layers[1].attn.key_value(y)
            self.keys.copy_(key)
            h = h + self.layers[1].attn.attend(y, self.keys, value)
            y = self.layers[2].attn_norm(h)
            _, value = self.layers[2].attn.key_value(y)
            return h + self.layers[2].attn.attend(y, self.keys, value)

    traced = trace(ready(Borrowing()), vectors())

    assert_refused(traced, lambda gm: parallelize(gm, [(m(0), a(2))]), r"'layers\.2\.attn' needs")


def test_a_write_that_two_branches_share_is_refused() -> None:
    class Sharing(Decoder):
        """Attention and FFN behind one norm that counts its calls in the features it gives both."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(2, 3, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            h = x * 1.5
            for layer in self.layers:
                y = self.seen.copy_(layer.attn_norm(h)) * 1.0
                h = h + layer.attn(y) + layer.mlp(y)
            return h

    traced = trace(ready(Sharing()), vectors())

    assert_refused(
        traced, lambda gm: parallelize(gm, [(m(0), m(1))]), r"'layers\.1\.mlp' shares \w+, which writes memory"
    )


class Bordered(Decoder):
    """Layer 1 is in an autocast region of its own."""

    depth = 4

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[0](x * 1.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.layers[2](self.layers[1](h))
        return self.layers[3](h)


def test_a_group_across_the_border_of_an_autocast_region_is_refused() -> None:
    traced = trace(ready(Bordered()).float(), vectors().float())

    for group in ((m(0), m(1)), (m(2), m(3)), (a(0), m(3)), (m(0), (a(1), m(1)))):
        assert_refused(
            traced, lambda gm, g=group: parallelize(gm, [g]), "border of an autocast, no_grad or vmap region"
        )


def test_a_group_inside_an_autocast_region_is_made_there() -> None:
    model = ready(Bordered()).float()
    traced = trace(model, vectors().float())

    parallelize(traced.gm, [(m(1), m(2))])

    with torch.no_grad():
        h = model.layers[0](vectors().float() * 1.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = h + model.attn(1, h)
            h = h + model.mlp(1, h) + model.mlp(2, h)
            h = h + model.attn(2, h)
        (got,) = traced()
        assert torch.equal(got, model.layers[3](h))


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.cross = Block(), Block(), Attention()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory = self.encoder(x * 1.5)
        h = y * 1.5
        h = h + self.cross.attend(h, *self.cross.key_value(memory), causal=False)
        return self.decoder(h)


@on_both_roads
def test_members_of_two_streams_are_refused(road: str) -> None:
    traced = trace(ready(TwoStreams()), vectors(), vectors(seed=2), road=road)

    assert_refused(
        traced,
        lambda gm: parallelize(gm, [("encoder.mlp", "decoder.mlp")]),
        r"'decoder\.mlp' and 'encoder\.mlp' belong to different residual streams",
    )


def test_groups_of_two_streams_are_made_in_one_call() -> None:
    model = ready(TwoStreams())
    x, y = vectors(), vectors(seed=2)
    traced = trace(model, x, y)

    parallelize(traced.gm, [("encoder.attn", "encoder.mlp"), ("decoder.mlp", "cross")])

    def read(block: Block, h: Tensor) -> tuple[Tensor, Tensor]:
        return block.attn(block.attn_norm(h)), block.mlp(block.mlp_norm(h))

    memory = x * 1.5 + sum(read(model.encoder, x * 1.5))
    h = y * 1.5
    _, f = read(model.decoder, h)
    h = h + model.cross.attend(h, *model.cross.key_value(memory), causal=False) + f
    assert_same(traced(), h + read(model.decoder, h)[0])


@on_both_roads
def test_an_unknown_member_is_refused_with_the_nearest(road: str) -> None:
    traced = traced_deep(road).copy()

    assert_refused(
        traced, lambda gm: parallelize(gm, [(m(0), (a(1), "layers.1.ffn"))]), r"'layers\.1\.ffn' .*nearest: layers"
    )


@on_both_roads
def test_an_error_in_the_second_group_takes_the_first_back(road: str) -> None:
    traced = trace(ready(LateKeys()), vectors(), road=road)

    assert_refused(traced, lambda gm: parallelize(gm, [(m(1), m(2)), (a(0), a(2))]), "needs")


class Rewritten(Stream):
    """The point that the middle FFN reads is written over after its sum."""

    def __init__(self) -> None:
        super().__init__(SwiGLU(), SwiGLU(), SwiGLU())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 1.5
        h1 = h + self.branch(0, h)
        h2 = h1 + self.branch(1, h1)
        self.write(h1)
        return h2 + self.branch(2, h2), h1

    def write(self, h: Tensor) -> None:
        h.view(-1).mul_(2)


class Replaced(Rewritten):
    """All of it is written over at once, with what nobody else reads."""

    def write(self, h: Tensor) -> None:
        h.copy_(2 * h)


@on_both_roads
def test_a_point_that_is_overwritten_later_takes_no_group(road: str) -> None:
    model = ready(Rewritten())
    traced = trace(model, vectors(), road=road)

    words = r"'layers\.1\.body': the stream where its group stands is overwritten in place"
    assert_refused(traced, lambda gm: parallelize(gm, [("layers.1.body", "layers.2.body")]), words)
    parallelize(traced.gm, [("layers.0.body", "layers.2.body")])

    h = vectors() * 1.5
    h = h + model.branch(0, h) + model.branch(2, h)
    assert_same(traced(), (h + model.branch(1, h), 2 * h))


@on_both_roads
def test_a_point_that_is_replaced_whole_is_still_there_for_a_group(road: str) -> None:
    model = ready(Replaced())
    traced = trace(model, vectors(), road=road)

    parallelize(traced.gm, [("layers.1.body", "layers.2.body")])

    h = vectors() * 1.5
    h = h + model.branch(0, h)
    assert_same(traced(), (h + model.branch(1, h) + model.branch(2, h), 2 * h))


@on_both_roads
def test_a_dtype_that_the_place_of_the_group_does_not_have_is_refused(road: str) -> None:
    class Rising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(SwiGLU()), Layer(SwiGLU())])

        def forward(self, x: Tensor) -> Tensor:
            h = (x * 1.5).float()
            h = h + self.layers[0].body(h.double())
            return h + self.layers[1].body(h)

    traced = trace(ready(Rising()), vectors(), road=road)

    words = r"'layers\.1\.body' reads a stream of torch\.float64, its group one of torch\.float32"
    assert_refused(traced, lambda gm: parallelize(gm, [("layers.0.body", "layers.1.body")]), words)


@on_both_roads
@pytest.mark.parametrize("groups", [[(m(0), m(1))], [(a(0), a(1))]], ids=["ffn", "attention"])
def test_a_ladder_is_rewired_by_what_its_branches_read(road: str, groups: Sequence[Group]) -> None:
    class Ladder(Decoder):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = [x * 1.5]
            for index in range(2):
                for part in (self.attn, self.mlp):
                    h.append(h[-1] + part(index, h[max(len(h) - 2, 0)]))
            return tuple(h[1:])

    model = ready(Ladder())
    traced = trace(model, vectors(), road=road)

    parallelize(traced.gm, groups)

    h = vectors() * 1.5
    if groups[0][0] == m(0):
        h1 = h + model.attn(0, h)
        h2 = h1 + model.mlp(0, h) + model.mlp(1, h)
        h3 = h2 + model.attn(1, h1)
        assert_same(traced(), (h1, h2, h3, h3))
    else:
        h1 = h + model.attn(0, h) + model.attn(1, h)
        h2 = h1 + model.mlp(0, h)
        h4 = h2 + model.mlp(1, h2)
        assert_same(traced(), (h1, h2, h2, h4))


@on_both_roads
def test_a_plan_in_one_go_is_the_passes_in_a_row(road: str) -> None:
    one, other = (traced_deep(road).copy() for _ in range(2))

    apply_plan(one.gm, Plan(drop=[a(1)], parallel=[[m(0), m(1)]]), names=one.names)
    drop(other.gm, [a(1)])
    parallelize(other.gm, [(m(0), m(1))])

    assert_same(one(), other())
