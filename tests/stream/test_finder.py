"""Every branch of every stream is found, with the point it reads and what it adds; nothing else is a stream."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfuse.errors import PlanError
from fxfuse.graph.ops import op
from fxfuse.stream.finder import find_streams
from tests.models.blocks import (
    MLP,
    WIDTH,
    Attention,
    Block,
    Decoder,
    Layer,
    Stream,
    SwiGLU,
    levels,
    on_both_roads,
    on_every_road,
    ready,
    trace,
    vectors,
)
from tests.models.decoders import CrossLayer, Tapped


@on_every_road
def test_a_decoder_is_one_stream_whose_branches_read_the_point_before_their_sum(road: str) -> None:
    traced = trace(ready(Decoder()), vectors(), road=road)

    stream = traced.stream

    names = ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"]
    assert levels(stream) == {name: index for index, name in enumerate(names)}
    assert [branch.kind for branch in stream.branches] == ["attention", "gated_ffn"] * 2
    assert [len(each.branches) for each in stream.sums] == [1, 1, 1, 1]
    assert stream.points == (stream.sums[0].stream.node, *(each.out for each in stream.sums))
    for branch, each in zip(stream.branches, stream.sums, strict=True):
        assert branch.terms == each.terms
        assert branch.read is each.stream.node
        assert not each.extras
        assert not branch.foreign
        assert branch.terms[0].node in branch.body
        assert branch.read not in branch.nodes


def test_looking_for_streams_leaves_the_graph_alone() -> None:
    traced = trace(ready(Decoder()), vectors())
    before = traced.gm.graph.python_code("self").src

    traced.streams  # noqa: B018

    assert traced.gm.graph.python_code("self").src == before


def add_in_place(h: Tensor, f: Tensor) -> Tensor:
    h += f
    return h


# How a sum is written, and the scale that it gives the branch.
SUMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "h + f": (lambda h, f: h + f, 1),
    "f + h": (lambda h, f: f + h, 1),
    "torch.add(h, f)": (torch.add, 1),
    "torch.add(f, h)": (lambda h, f: torch.add(f, h), 1),
    "h.add(f)": (lambda h, f: h.add(f), 1),
    "alpha": (lambda h, f: torch.add(h, f, alpha=0.5), 0.5),
    "h + f * 0.22": (lambda h, f: h + f * 0.22, 0.22),
    "0.22 * f + h": (lambda h, f: 0.22 * f + h, 0.22),
    "h + f / 4": (lambda h, f: h + f / 4, 0.25),
    "torch.mul": (lambda h, f: h + torch.mul(f, 3), 3),
    "two factors": (lambda h, f: h + (f * 0.5) * 0.5, 0.25),
    "h + -f": (lambda h, f: h + -f, -1),
    "h - f": (lambda h, f: h - f, -1),
    "h.sub(f, alpha)": (lambda h, f: h.sub(f, alpha=0.5), -0.5),
    "alpha and a factor": (lambda h, f: torch.add(h, f * 0.5, alpha=3), 1.5),
    "idle dropout": (lambda h, f: h + F.dropout(f, 0.1, training=False), 1),
    "dropout of p=0": (lambda h, f: h + F.dropout(f, 0.0, training=True), 1),
    "cast": (lambda h, f: h + f.to(h.dtype), 1),
    "cast and a factor": (lambda h, f: h + (f * 0.5).to(torch.float64), 0.5),
    "dropout of the sum": (lambda h, f: F.dropout(h + f, 0.1, training=False), 1),
    "h += f": (add_in_place, 1),
    "h.add_(f)": (lambda h, f: h.add_(f), 1),
    "h.add_(f, alpha)": (lambda h, f: h.add_(f, alpha=2), 2),
    "contiguous": (lambda h, f: h.contiguous() + f.contiguous(), 1),
}


@on_both_roads
def test_a_sum_is_found_however_it_is_written(road: str) -> None:
    model = Stream(*(Layer(SwiGLU(hidden=2), add=add) for add, _ in SUMS.values()))

    stream = trace(ready(model), vectors(), road=road).stream

    assert levels(stream) == {f"layers.{index}.body": index for index in range(len(SUMS))}
    assert {kind.kind for kind in stream.branches} == {"gated_ffn"}
    found = dict(zip(SUMS, (branch.scale.number for branch in stream.branches), strict=True))
    assert found == pytest.approx({name: scale for name, (_, scale) in SUMS.items()})
    assert not any(branch.scale.nodes for branch in stream.branches)


class Parallel(Decoder):
    """Attention and FFN side by side behind one norm; every layer writes the three terms in another order."""

    depth = 6

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        for index, layer in enumerate(self.layers):
            y = layer.attn_norm(h)
            a, f = layer.attn(y), layer.mlp(y)
            h = [
                lambda: a + f + h,  # noqa: B023  # called at once
                lambda: h + a + f,  # noqa: B023
                lambda: h + 0.5 * (f + a),  # noqa: B023
                lambda: F.dropout(a + f, 0.1, False) + h,  # noqa: B023
                lambda: a + (h + 0.5 * f),  # noqa: B023
                lambda: h + (a + f).contiguous(),  # noqa: B023
            ][index]()
        return h


@on_both_roads
def test_sums_of_three_are_opened_in_any_order(road: str) -> None:
    stream = trace(ready(Parallel()), vectors(), road=road).stream

    expected = {f"layers.{index}.{name}": index for index in range(6) for name in ("attn", "mlp")}
    assert levels(stream) == expected
    assert all({branch.kind for branch in each.branches} == {"attention", "gated_ffn"} for each in stream.sums)
    assert [stream[f"layers.{index}.mlp"].scale.number for index in range(6)] == [1, 1, 0.5, 1, 0.5, 1]


@on_both_roads
def test_branches_behind_one_norm_share_it_and_keep_their_own_names(road: str) -> None:
    stream = trace(ready(Parallel()), vectors(), road=road).stream

    attn, mlp = stream["layers.0.attn"], stream["layers.0.mlp"]
    assert attn.nodes & mlp.nodes
    assert set(attn.parameters) & set(mlp.parameters) == {attn.parameters[0]}  # the norm's


class Tokens(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(7, WIDTH)
        self.position = nn.Embedding(7, WIDTH)
        self.kind = nn.Embedding(2, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.token(ids) + self.position(torch.arange(ids.shape[1])) + self.kind(torch.zeros_like(ids))
        for layer in self.layers:
            h = layer(h)
        return h


@on_both_roads
def test_a_sum_of_embeddings_is_no_branch(road: str) -> None:
    traced = trace(ready(Tokens()), torch.arange(6).view(2, 3), road=road)

    stream = traced.stream

    assert [branch.name for branch in stream.branches] == [
        f"layers.{index}.{part}" for index in range(2) for part in ("attn", "mlp")
    ]
    assert (found := op(stream.points[0])) is not None
    assert found.name == "add"


@on_both_roads
def test_hidden_states_that_the_model_returns_are_points_of_the_stream(road: str) -> None:
    traced = trace(ready(Tapped()), vectors(), road=road)

    stream = traced.stream

    assert list(levels(stream).values()) == [0, 1, 2, 3]
    outputs = set(traced.gm.graph.output_node().all_input_nodes)
    assert {stream.points[0], stream.points[1], stream.points[3], stream.points[4]} <= outputs


class Ladder(Decoder):
    """Ladder residuals: a branch reads the point before the one it is added to."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        before = h
        for layer in self.layers:
            before, h = h, h + layer.attn(layer.attn_norm(before))
            before, h = h, h + layer.mlp(layer.mlp_norm(before))
        return self.head(self.norm(h)) + before.sum()


@on_both_roads
def test_a_ladder_branch_reads_one_point_earlier(road: str) -> None:
    stream = trace(ready(Ladder()), vectors(), road=road).stream

    assert levels(stream) == {"layers.0.attn": 0, "layers.0.mlp": 0, "layers.1.attn": 1, "layers.1.mlp": 2}
    assert [len(each.branches) for each in stream.sums] == [1, 1, 1, 1]


class InnerResidual(nn.Module):
    """A mixer with more residuals inside than the model has outside."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(depth))
        self.mlp = SwiGLU()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(x.transpose(1, 2)).transpose(1, 2)
            x = x + self.mlp(x)
        return self.out(x)


@on_both_roads
@pytest.mark.parametrize("depth", [1, 4])
def test_a_residual_inside_a_branch_is_no_stream(road: str, depth: int) -> None:
    model = Stream(SwiGLU(), InnerResidual(depth), SwiGLU())

    stream = trace(ready(model), vectors(), road=road).stream

    assert [(branch.name, branch.kind) for branch in stream.branches] == [
        ("layers.0.body", "gated_ffn"),
        ("layers.1.body", "other"),
        ("layers.2.body", "gated_ffn"),
    ]


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block() for _ in range(2))
        self.decoder = nn.ModuleList(Block() for _ in range(2))
        self.cross = nn.ModuleList(Attention() for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        h = source * 1.5
        for layer in self.encoder:
            h = layer(h)
        memory = self.norm(h)
        t = target * 1.5
        for layer, cross in zip(self.decoder, self.cross, strict=True):
            t = t + layer.attn(layer.attn_norm(t))
            t = t + cross.attend(t, *cross.key_value(memory), causal=False)
            t = t + layer.mlp(layer.mlp_norm(t))
        return t


@on_both_roads
def test_an_encoder_and_a_decoder_are_two_streams_in_the_order_of_the_graph(road: str) -> None:
    traced = trace(ready(EncoderDecoder()), vectors(), vectors(seed=2), road=road)

    encoder, decoder = traced.streams  # in the order of the graph, although the second one is longer

    assert list(levels(encoder)) == ["encoder.0.attn", "encoder.0.mlp", "encoder.1.attn", "encoder.1.mlp"]
    own = [f"{part}" for i in range(2) for part in (f"decoder.{i}.attn", f"cross.{i}", f"decoder.{i}.mlp")]
    assert list(levels(decoder)) == own
    assert list(levels(decoder).values()) == list(range(6))


@on_both_roads
def test_what_a_branch_takes_from_another_is_foreign(road: str) -> None:
    stream = trace(ready(CrossLayer()), vectors(), road=road).stream

    assert list(levels(stream).values()) == list(range(6))
    first, second, third = (stream[f"layers.{index}.attn"] for index in range(3))
    assert not first.foreign
    assert len(second.foreign) == 2  # keys and values
    assert set(second.foreign) <= first.nodes
    assert len(third.foreign) == 1  # half of the first values
    assert third.foreign[0] not in third.nodes
    assert not stream["layers.1.mlp"].foreign


class EmbeddingSkip(Decoder):
    """Each sum adds a value that does not depend on the stream."""

    def forward(self, x: Tensor) -> Tensor:
        h, extra = x * 1.5, torch.tanh(x)
        for layer in self.layers:
            h = h + layer.attn(layer.attn_norm(h)) + extra
            h = h + 0.1 * extra + layer.mlp(layer.mlp_norm(h))
        return h


@on_both_roads
def test_a_term_that_does_not_read_the_stream_is_an_extra_and_breaks_nothing(road: str) -> None:
    stream = trace(ready(EmbeddingSkip()), vectors(), road=road).stream

    names = ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"]
    assert levels(stream) == {name: index for index, name in enumerate(names)}
    assert [len(each.extras) for each in stream.sums] == [1, 1, 1, 1]


WEIGHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "times a gain": lambda x, weight: weight * x,
    "over a gain": lambda x, weight: x / weight,
    "times a mask": lambda x, weight: x * torch.stack([weight] * x.shape[-2]),
    "a cast of it": lambda x, weight: weight * x.bfloat16().float(),
}


@pytest.mark.parametrize("name", WEIGHED)
def test_an_earlier_point_of_the_stream_times_a_weight_adds_no_branch(name: str) -> None:
    class Again(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            first = h = x * 1.5
            for layer in self.layers:
                h = h + layer.mlp(layer.mlp_norm(h)) + WEIGHED[name](first, self.gain)
            return h

    stream = trace(ready(Again()), vectors()).stream

    assert list(levels(stream)) == ["layers.0.mlp", "layers.1.mlp"]


class Fork(Decoder):
    """Two towers on a common trunk."""

    depth = 4

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        trunk = self.layers[0](x * 1.5)
        return self.layers[2](self.layers[1](trunk)), self.layers[3](trunk)


@on_both_roads
def test_where_a_stream_forks_the_longer_arm_goes_on(road: str) -> None:
    traced = trace(ready(Fork()), vectors(), road=road)

    long, short = traced.streams

    assert list(levels(long).values()) == list(range(6))
    assert list(levels(short)) == ["layers.3.attn", "layers.3.mlp"]
    assert short.points[0] is long.points[2]


class Mixed(Decoder):
    """A float64 stream whose branches compute in float32."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        for layer in self.layers:
            h = h + layer.attn(layer.attn_norm(h).float()).to(h.dtype)
            h = (h + layer.mlp(layer.mlp_norm(h).float())).to(torch.float64)
        return h


@on_both_roads
def test_casts_between_the_stream_and_its_branches_are_seen_through(road: str) -> None:
    model = ready(Mixed())
    for layer in model.layers:
        layer.attn.float()
        layer.mlp.float()

    stream = trace(model, vectors(), road=road).stream

    names = ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"]
    assert levels(stream) == {name: index for index, name in enumerate(names)}
    assert [branch.kind for branch in stream.branches] == ["attention", "gated_ffn"] * 2


def test_the_first_point_is_what_the_first_branch_reads_though_its_sum_takes_a_cast_of_it() -> None:
    """Mamba's residual_in_fp32."""
    bodies = [Layer(SwiGLU(), add=lambda h, f: h.float() + f) for _ in range(3)]

    for dtype in (torch.float64, torch.float32):
        stream = trace(ready(Stream(*bodies)).to(dtype), vectors().to(dtype)).stream

        assert levels(stream) == {f"layers.{index}.body": index for index in range(3)}
        assert stream.points[0] is not stream.sums[0].stream.node
        assert all(branch.ffn is not None for branch in stream.branches)


def test_a_sum_of_a_lower_precision_than_the_stream_is_no_residual_sum() -> None:
    bodies = [Layer(SwiGLU(), add=lambda h, f: (h.float() + f.float()).to(h.dtype)) for _ in range(3)]

    found = {t: trace(ready(Stream(*bodies)).to(t), vectors().to(t)).streams for t in (torch.float64, torch.bfloat16)}

    assert found[torch.float64] == ()
    (stream,) = found[torch.bfloat16]
    assert levels(stream) == {f"layers.{index}.body": index for index in range(3)}


class PartlyAutocast(Decoder):
    depth = 3

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[0](x * 1.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.layers[1](h)
        return self.layers[2](h)


def test_an_autocast_region_in_the_middle_hides_no_branch() -> None:
    stream = trace(ready(PartlyAutocast()).float(), vectors().float()).stream

    assert list(levels(stream).values()) == list(range(6))
    assert [branch.kind for branch in stream.branches] == ["attention", "gated_ffn"] * 3


def test_an_exported_autocast_region_is_one_op_and_streams_end_at_it() -> None:
    streams = trace(ready(PartlyAutocast()).float(), vectors().float(), road="export").streams

    assert [list(levels(stream)) for stream in streams] == [
        ["layers.0.attn", "layers.0.mlp"],
        ["layers.2.attn", "layers.2.mlp"],
    ]


class PostNorm(Decoder):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        for layer in self.layers:
            h = layer.attn_norm(h + layer.attn(h))
            h = layer.mlp_norm(h + layer.mlp(h))
        return h


@on_both_roads
def test_a_norm_on_the_stream_ends_it(road: str) -> None:
    streams = trace(ready(PostNorm()), vectors(), road=road).streams

    assert [[branch.name for branch in stream.branches] for stream in streams] == [
        ["layers.0.attn"],
        ["layers.0.mlp"],
        ["layers.1.attn"],
        ["layers.1.mlp"],
    ]


NO_SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a vector for all tokens": lambda h, f: h + f.mean(1, keepdim=True),
    "a product": lambda h, f: h * f,
    "a stream scaled by what is computed": lambda h, f: h.mean(-1, keepdim=True) * h + f,
    "the stream twice": lambda h, f: h + h,
    "not the stream": lambda h, f: f + f,
    "concatenation": lambda h, f: torch.cat((h, f), -1)[..., :WIDTH],
    "a learned mixture": lambda h, f: torch.lerp(h, f, 0.5),
}


class Masked(Attention):
    """Attention by hand, under a mask of the shape of its scores."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ self.q(x).transpose(1, 2) + mask
        return self.o(torch.softmax(scores, -1) @ self.v(x))


class OneMask(nn.Module):
    """Post-norm layers under one mask: from the second on, scores are the mask plus what was computed with it."""

    def __init__(self) -> None:
        super().__init__()
        self.attns = nn.ModuleList(Masked() for _ in range(3))
        self.mlps = nn.ModuleList(SwiGLU() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[0], x.shape[1], x.shape[1]), -1e4, dtype=x.dtype).triu(1)
        for attn, mlp in zip(self.attns, self.mlps, strict=True):
            x = F.rms_norm(x + attn(x, mask), (WIDTH,))
            x = F.rms_norm(x + mlp(x), (WIDTH,))
        return x


def test_a_mask_is_no_stream_that_hides_the_layers() -> None:
    streams = trace(ready(OneMask()), vectors()).streams

    names = [f"{part}.{index}" for index in range(3) for part in ("attns", "mlps")]
    assert [list(levels(stream)) for stream in streams] == [[name] for name in names]


@pytest.mark.parametrize("name", NO_SUMS)
def test_what_is_not_the_stream_plus_something_is_no_residual_sum(name: str) -> None:
    model = Stream(Layer(SwiGLU()), Layer(SwiGLU(), add=NO_SUMS[name]), Layer(SwiGLU()))

    streams = trace(ready(model), vectors(), road="export").streams

    found = {branch.name for stream in streams for branch in stream.branches}
    assert {"layers.0.body", "layers.2.body"} <= found | {"layers.0.body"}
    assert "layers.1.body" not in found
    assert all(len(stream.sums) < 3 for stream in streams)


def test_a_graph_of_integers_has_no_stream() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + (x * 2) @ torch.ones(4, 4, dtype=torch.int64)
            return x

    assert trace(Counting(), torch.arange(16).view(4, 4), road="export").streams == ()


def test_symbolic_sizes_are_compared_and_not_guarded_on() -> None:
    model = ready(Decoder())
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}

    program = torch.export.export(model, (vectors(),), dynamic_shapes=(sizes,))
    constraints = str(program.range_constraints)
    gm = program.module()
    (stream,) = find_streams(gm)

    assert len(stream.branches) == 4
    assert str(program.range_constraints) == constraints
    other = vectors(4, 6, WIDTH)
    torch.testing.assert_close(gm(other), model(other))


def test_an_unknown_name_is_an_error_with_the_nearest_names() -> None:
    stream = trace(ready(Stream(SwiGLU(), MLP())), vectors()).stream

    assert stream["layers.1.body"].kind == "ffn"
    with pytest.raises(PlanError, match=r"'layers\.1\.bodi'.*nearest: layers\.1\.body"):
        stream["layers.1.bodi"]


class Rows(Layer):
    """Its norm reads tokens of a batch, its sum is one of rows: ``again`` makes them of the tokens."""

    def __init__(self, again: Callable[[Tensor], Tensor]) -> None:
        super().__init__(SwiGLU(), nn.LayerNorm(WIDTH))
        self.again = again

    def forward(self, h: Tensor) -> Tensor:
        return (self.again(h) + self.again(self.branch(h))).view(h.shape).to(h.dtype)


@on_both_roads
@pytest.mark.parametrize(
    "again", [lambda x: x.reshape(-1, WIDTH), lambda x: x.view(-1, 1, WIDTH), lambda x: x.contiguous().double()]
)
def test_the_first_sum_may_be_of_a_view_of_what_its_branch_reads(again: Callable[[Tensor], Tensor], road: str) -> None:
    stream = trace(ready(Stream(Rows(again), Rows(again))), vectors(), road=road).stream

    assert levels(stream) == {"layers.0.body": 0, "layers.1.body": 1}
