"""An attention that is made linear contributes its output projection of its norm, and nothing else changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fxfuse.passes import apply_plan, linear, parallelize
from fxfuse.passes.linear import OwnMap
from fxfuse.plan import Plan
from tests.models.blocks import (
    WIDTH,
    Attention,
    Decoder,
    Layer,
    Stream,
    SwiGLU,
    Traced,
    assert_no_dead_nodes,
    assert_refused,
    assert_same,
    on_both_roads,
    on_every_road,
    ready,
    trace,
    vectors,
)
from tests.models.capture import capture
from tests.models.decoders import Cached, CrossLayer, KeyOutputs, Parallel, decoder, traced_decoder

ATTENTIONS = ["layers.0.attn", "layers.1.attn"]


def mapped(model: Decoder, index: int, h: Tensor) -> Tensor:
    """What a linear attention contributes, told by the decoder's own modules."""
    layer = model.layers[index]
    return layer.attn.o(layer.attn_norm(h))


def by_hand(model: Decoder, x: Tensor, names: Collection[str]) -> Tensor:
    h = x * 1.5
    for index in range(model.depth):
        h = h + (mapped if f"layers.{index}.attn" in names else type(model).attn)(model, index, h)
        h = h + model.mlp(index, h)
    return model.head(model.norm(h))


@pytest.mark.parametrize("names", [c for n in (1, 2) for c in itertools.combinations(ATTENTIONS, n)], ids=str)
@on_every_road
def test_it_is_the_model_whose_attentions_are_their_output_projections(names: tuple[str, ...], road: str) -> None:
    traced = traced_decoder(road).copy()

    report = linear(traced.gm, names)

    assert [edit.branches for edit in report.done] == [(name,) for name in names]
    assert not report.refused
    assert_same(traced(), by_hand(decoder(), vectors(), names))
    assert_no_dead_nodes(traced.gm)
    assert traced.linears == 1 + 2 * 3 + sum(1 if name in names else 4 for name in ATTENTIONS)
    assert traced.count("scaled_dot") == 2 - len(names)


@on_every_road
def test_the_branch_keeps_its_name_and_is_linear_from_then_on(road: str) -> None:
    traced = traced_decoder(road).copy()

    linear(traced.gm, ATTENTIONS[:1])

    branch = traced["layers.0.attn"]
    assert (branch.kind, branch.reason) == ("linear", "a linear map, no hidden layer")
    assert traced["layers.1.attn"].kind == "attention"
    code = traced.gm.code
    assert not linear(traced.gm, ATTENTIONS[:1])
    assert traced.gm.code == code


def test_nothing_to_make_linear_changes_nothing() -> None:
    traced = traced_decoder("export").copy()
    before = traced.gm.code

    assert not linear(traced.gm, [])
    assert traced.gm.code == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers.1.attention", r"'layers\.1\.attention' is no branch of this graph; nearest: layers\.1\.attn"),
        ("layers.1.mlp", r"'layers\.1\.mlp' is no attention but of kind gated_ffn: linear is for attention"),
    ],
)
@on_both_roads
def test_what_is_no_attention_is_refused(road: str, name: str, words: str) -> None:
    assert_refused(traced_decoder(road).copy(), lambda gm: linear(gm, ["layers.0.attn", name]), words)


class Wide(Attention):
    """Has heads of more features together than the stream has."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, 12, bias=False) for _ in range(3))
        self.o = nn.Linear(12, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.heads(self.q(x)), *self.key_value(x), is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(*x.shape[:2], 12))


class WideFromTwoSteps(Wide):
    """Adds the bias of its projection in a step of its own, and doubles what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * (super().forward(x) + self.bias)


class WideFlattened(Wide):
    """Has a bias, and views of its output follow."""

    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, WIDTH).view(x.shape)


@pytest.mark.parametrize(("attention", "factor"), [(Wide, 1), (WideFromTwoSteps, 2), (WideFlattened, 1)])
@pytest.mark.parametrize("bias", [True, False])
@on_every_road
def test_where_the_projection_does_not_fit_another_map_is_taken(
    road: str, attention: Callable[[], nn.Module], factor: int, bias: bool
) -> None:
    class Wider(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers[0].attn = attention()

    model = ready(Wider())
    weight, shift = torch.randn(WIDTH, WIDTH).double(), torch.randn(WIDTH).double() if bias else None
    traced = trace(model, vectors(), road=road)

    linear(traced.gm, ATTENTIONS, {ATTENTIONS[0]: OwnMap(weight, shift)})

    h = vectors() * 1.5
    h = h + factor * F.linear(model.layers[0].attn_norm(h), weight, shift)
    h = h + model.mlp(0, h)
    h = h + mapped(model, 1, h)
    h = h + model.mlp(1, h)
    h = h + model.attn(2, h) if model.depth > 2 else h
    h = h + model.mlp(2, h) if model.depth > 2 else h
    assert_same(traced(), model.head(model.norm(h)))
    assert_no_dead_nodes(traced.gm)
    assert traced[ATTENTIONS[0]].kind == "linear"
    assert linear(traced.gm, ATTENTIONS) == linear(traced.gm, [])


@on_both_roads
def test_no_other_map_is_taken_by_one_that_flattens_its_tokens(road: str) -> None:
    class WideAndFlat(Wide):
        def forward(self, x: Tensor) -> Tensor:
            mixed = F.scaled_dot_product_attention(self.heads(self.q(x)), *self.key_value(x), is_causal=True)
            return self.o(mixed.transpose(1, 2).reshape(-1, 12)).view(x.shape)

    traced = trace(ready(Stream(WideAndFlat(), SwiGLU())), vectors(), road=road)
    (name,) = [branch.name for branch in traced.stream.branches if branch.kind == "attention"]
    own = OwnMap(torch.zeros(WIDTH, WIDTH).double())
    before = dict(traced.gm.named_buffers())

    assert_refused(traced, lambda gm: linear(gm, [name], {name: own}), "it flattens what it reads")
    assert dict(traced.gm.named_buffers()).keys() == before.keys()


class Gated(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(self.gate(x))


class Shifted(Attention):
    """Reads each token's predecessor, as token shift does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 1, -1)))


class TwoNorms(Attention):
    """Takes its values from another norm than its queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.heads(self.k(x)), self.heads(self.v(self.norm(x))))


class GatedInput(Attention):
    """Its norm's output is times a gate, so that the gate's projection comes before those of the attention (AXK2)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.sigmoid(self.gate(x)))


class OfTorch(nn.Module):
    """PyTorch's own, which some tracers leave one call, and others write out over transposed tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        (Wide, r"reads 12 features, and its input has 8\. fxfuse\.prune and fxfuse\.apply put a linear map of 8 feat"),
        (Gated, "does not end in one linear projection but in "),
        (Shifted, "what its projections read is no norm of the stream: "),
        (GatedInput, r"what its projections read is no norm of the stream: mul\w* is that times what it projects"),
        (TwoNorms, "its first projections read different values: "),
        (OfTorch, "does not end in one linear projection|transpose is a part of it"),
    ],
)
@on_both_roads
def test_whose_ends_cannot_be_joined_is_refused(road: str, attention: Callable[[], nn.Module], words: str) -> None:
    traced = trace(ready(Stream(attention(), SwiGLU())), vectors(), road=road)
    (name,) = [branch.name for branch in traced.stream.branches if branch.kind == "attention"]

    assert_refused(traced, lambda gm: linear(gm, [name]), words)


class Sandwich(Layer):
    """Norms, scales and drops out what its attention contributes."""

    def __init__(self) -> None:
        super().__init__(Attention())
        self.after, self.gain = nn.LayerNorm(WIDTH), nn.Parameter(torch.ones(WIDTH))

    def finish(self, f: Tensor) -> Tensor:
        return 0.7 * F.dropout(self.gain * self.after(f), 0.3, self.training)

    def branch(self, h: Tensor) -> Tensor:
        return self.finish(super().branch(h))


@pytest.mark.parametrize("training", [False, True])
def test_what_follows_the_output_projection_stays(training: bool) -> None:
    model = ready(Stream(Sandwich(), SwiGLU()))
    model.layers[0].train(training)
    traced = trace(model, vectors())

    linear(traced.gm, ["layers.0.body"])

    sandwich = model.layers[0]
    torch.manual_seed(3)
    got = traced()
    torch.manual_seed(3)
    h = vectors() * 1.5
    h = h + sandwich.finish(sandwich.body.o(sandwich.norm(h)))
    assert_same(got, h + model.branch(1, h))
    assert traced["layers.0.body"].kind == "linear"


class GPT2Attention(Attention):
    """Packed queries, keys and values, and maps with biases over flattened rows."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v, self.o
        self.qkv, self.o = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.heads, self.qkv(x).split(WIDTH, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.o(mixed.reshape(*mixed.shape[:-2], -1).contiguous())


class Flat(Attention):
    """Projects flattened rows, and its output with the rows apart again."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        q, k, v = (self.heads(each(rows).view(x.shape)) for each in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("attention", [GPT2Attention, Flat])
@torch.no_grad()
def test_packed_flattened_and_symbolic_ones_lose_their_scores_too(
    attention: Callable[[], nn.Module], dynamic: bool
) -> None:
    model = ready(Stream(attention(), SwiGLU()))
    gm, compiled = capture(model, vectors(), dynamic=dynamic)

    apply_plan(gm, Plan(linear=["layers.0.body"]), strict=True)

    for x in (vectors(), vectors(3, 5, WIDTH))[: 1 + dynamic]:
        h = x * 1.5
        h = h + model.layers[0].body.o(model.layers[0].norm(h))
        assert_same((compiled(x),), h + model.branch(1, h))
    assert not any("scaled_dot" in str(node.target) for node in gm.graph.nodes)


def test_without_sizes_nobody_can_tell_and_with_example_inputs_one_can() -> None:
    model = ready(Stream(Attention(), SwiGLU()))
    traced = Traced(torch.fx.symbolic_trace(model), (vectors(),))

    assert_refused(traced, lambda gm: linear(gm, ["layers.0.body"]), "give the pass example inputs|no attention")
    apply_plan(traced.gm, Plan(linear=["layers.0.body"]), inputs=traced.inputs)

    h = vectors() * 1.5
    h = h + model.layers[0].body.o(model.layers[0].norm(h))
    assert_same(traced(), h + model.branch(1, h))


@on_both_roads
def test_of_two_branches_in_one_sum_the_other_stays_with_the_norm_they_share(road: str) -> None:
    model = ready(Parallel())
    traced = trace(model, vectors(), road=road)

    linear(traced.gm, ["layers.0.attn"])

    h = vectors() * 1.5
    first, second = model.layers
    y = first.attn_norm(h)
    h = h + first.attn.o(y) + first.mlp(y)
    y = second.attn_norm(h)
    assert_same(traced(), h + 0.5 * (second.attn(y) + second.mlp(y)))
    assert_no_dead_nodes(traced.gm)


@on_both_roads
def test_keys_that_others_read_stay_where_they_were_though_the_branch_moves(road: str) -> None:
    model = ready(KeyOutputs())
    traced = trace(model, vectors(), road=road)

    report = linear(traced.gm, ["layers.1.attn"])
    parallelize(traced.gm, [["layers.0.mlp", "layers.1.attn"]])

    (edit,) = report.done
    assert edit.detail.endswith("of its nodes serve others and stay")
    first, second = model.layers
    h = vectors() * 1.5
    y = first.attn_norm(h)
    keys = [*first.attn.key_value(y)]
    h = h + first.attn(y)
    h = h + model.mlp(0, h) + second.attn.o(second.attn_norm(h))
    keys += second.attn.key_value(second.attn_norm(h))
    assert_same(traced(), (h + model.mlp(1, h), *keys))


@on_both_roads
def test_keys_of_a_linear_layer_serve_the_layers_that_share_them(road: str) -> None:
    model = ready(CrossLayer())
    traced = trace(model, vectors(), road=road)

    linear(traced.gm, ["layers.0.attn"])

    h = vectors() * 1.5
    key, value = model.layers[0].attn.key_value(model.layers[0].attn_norm(h))
    h = h + mapped(model, 0, h)
    h = h + model.mlp(0, h)
    h = h + model.layers[1].attn.attend(model.layers[1].attn_norm(h), key, value)
    h = h + model.mlp(1, h)
    y = model.layers[2].attn_norm(h)
    k, v = model.layers[2].attn.key_value(y)
    h = h + model.layers[2].attn.attend(y, k, 0.5 * v + 0.5 * value)
    assert_same(traced(), h + model.mlp(2, h))


def test_a_cache_that_the_graph_writes_is_written_on() -> None:
    model, position = ready(Cached()), torch.arange(3)
    assert isinstance(model, Cached)
    traced = trace(model, vectors(), position)
    for layer in model.layers:
        layer.attn.keys.zero_()
        layer.attn.values.zero_()

    linear(traced.gm, ["layers.1.attn"])
    got = traced()

    h = vectors() * 1.5
    for index in range(3):
        f, key, _ = model.padded(index, h)
        assert_same((model.layers[index].attn.keys,), key)
        h = h + (mapped(model, index, h) if index == 1 else f)
        h = h + model.mlp(index, h)
    assert_same(got, h)


class Reused(Attention):
    """Writes over its input once its projections have read it."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        x.mul_(0)
        mixed = F.scaled_dot_product_attention(*map(self.heads, (q, k, v)), is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(x.shape))


@on_both_roads
def test_an_input_that_is_overwritten_is_read_as_it_was(road: str) -> None:
    model = ready(Stream(Reused(), SwiGLU()))
    traced = trace(model, vectors(), road=road)

    linear(traced.gm, ["layers.0.body"])

    h = vectors() * 1.5
    h = h + model.layers[0].body.o(model.layers[0].norm(h))
    assert_same(traced(), h + model.branch(1, h))


@on_both_roads
def test_a_linear_branch_is_a_member_like_any_other(road: str) -> None:
    traced = traced_decoder(road).copy()
    plan = Plan(
        linear=["layers.1.attn"],
        parallel=[["layers.0.attn", "layers.1.attn"], ["layers.0.mlp", "layers.1.mlp"]],
    )

    apply_plan(traced.gm, plan, names=traced.names, strict=True, inputs=traced.inputs, verify=True, max_rewrites=1)

    model, h = decoder(), vectors() * 1.5
    h = h + model.attn(0, h) + mapped(model, 1, h)
    h = h + model.mlp(0, h) + model.mlp(1, h)
    assert_same(traced(), model.head(model.norm(h)))
    assert traced.linears == 1 + 4 + 1 + 2


@pytest.mark.parametrize("names", [["layers.0.attn"], ["layers.0.attn", "layers.1.mlp"]])
def test_what_pruning_left_of_an_attention_goes_by_the_name_of_its_module(names: list[str]) -> None:
    model = ready(Decoder())
    attn = model.layers[0].attn
    del attn.q, attn.k, attn.v
    attn.forward = attn.o.forward
    traced = trace(model, vectors())
    assert traced["layers.0.attn.o"].kind == "linear"
    groups = [names] if len(names) > 1 else []

    apply_plan(traced.gm, Plan(linear=names[:1], parallel=groups), names=traced.names, strict=True)

    assert traced["layers.0.attn"].kind == "linear"
    h = vectors() * 1.5
    read = h
    h = h + mapped(model, 0, h)
    if groups:
        h = h + model.mlp(1, read)
    h = h + model.mlp(0, h)
    h = h + model.attn(1, h)
    h = h if groups else h + model.mlp(1, h)
    assert_same(traced(), model.head(model.norm(h)))
