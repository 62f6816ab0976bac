"""A branch has the name of the module that it is, the weights that it uses, and it keeps its name through rewrites."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxfuse.ffn.adapter import REASON
from fxfuse.graph.paths import deeper
from fxfuse.passes import drop, simplify
from fxfuse.stream.branch import STAMP, number_of_parameters, stamp
from fxfuse.stream.finder import find_streams
from tests.models.blocks import (
    HIDDEN,
    MLP,
    WIDTH,
    Block,
    Decoder,
    Layer,
    Stream,
    SwiGLU,
    Traced,
    on_both_roads,
    on_every_road,
    ready,
    trace,
    vectors,
)
from tests.models.decoders import Tied


def names(traced: Traced) -> list[str]:
    return [branch.name for stream in traced.streams for branch in stream.branches]


def weights(traced: Traced, name: str) -> list[str]:
    """The names of a branch's parameters."""
    by_node = traced.names or {n: str(n.target) for n in traced.gm.graph.nodes if n.op == "get_attr"}
    return sorted(by_node[node] for node in traced[name].parameters)


@on_every_road
def test_a_branch_knows_its_own_weights_and_those_of_its_norm(road: str) -> None:
    traced = trace(ready(Decoder()), vectors(), road=road)

    assert weights(traced, "layers.1.mlp") == [
        "layers.1.mlp.down.weight",
        "layers.1.mlp.gate.weight",
        "layers.1.mlp.up.weight",
        "layers.1.mlp_norm.weight",
    ]
    assert number_of_parameters(traced["layers.1.mlp"]) == 3 * WIDTH * HIDDEN + WIDTH


class Flat(nn.Module):
    """A layer whose FFN is no module of its own: its linears hang on the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.fc2(torch.relu(self.fc1(self.norm(h))))


class Sandwich(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.mlp, self.after = nn.RMSNorm(WIDTH), SwiGLU(), nn.RMSNorm(WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.after(self.mlp(self.before(h)))


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.proj(self.norm(h))


class Deep(nn.Module):
    """A body deep inside wrappers that add nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(WIDTH), nn.Sequential(nn.Sequential(MLP())))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.block(h)


class Shapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.sandwich, self.single, self.deep = Flat(), Sandwich(), Single(), Deep()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.deep(self.single(self.sandwich(self.flat(x * 1.5))))
        return h + torch.roll(h, 1, 1) @ torch.eye(WIDTH).to(h) * self.scale


@on_both_roads
def test_a_name_is_the_deepest_path_that_holds_all_weights_but_the_norms(road: str) -> None:
    traced = trace(ready(Shapes()), vectors(), road=road)

    assert names(traced) == ["flat", "sandwich.mlp", "single.proj", "deep.block.1.0.0", "@4"]


class Gate(nn.Module):
    """A norm whose output goes through a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x * torch.sigmoid(self.gate(x))


class GatedNorms(Decoder):
    def __init__(self) -> None:
        super().__init__()
        for index, layer in enumerate(self.layers):
            layer.attn_norm = Gate()
            layer.mlp_norm = Gate() if index else layer.mlp_norm


@on_both_roads
def test_a_norm_with_matrices_takes_no_name_away(road: str) -> None:
    traced = trace(ready(GatedNorms()), vectors(), road=road)

    assert names(traced) == ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"]


class Filtered(Decoder):
    """What each module makes goes through a map of the layer's own (Inkling's short convolutions)."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.attn_filter, layer.mlp_filter = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        for index, layer in enumerate(self.layers):
            h = h + layer.attn_filter(self.attn(index, h))
            h = h + layer.mlp_filter(self.mlp(index, h))
        return h


class Loose(nn.Module):
    """Two FFNs that are no modules, behind norms that are of several maps."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.Sequential(Gate(), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        h = h + self.down(torch.relu(self.up(self.norms[0](h))))
        return h + self.narrow(torch.relu(self.wide(self.norms[1](h))))


@on_both_roads
def test_a_map_behind_a_module_takes_no_name_away(road: str) -> None:
    assert names(trace(ready(Filtered()), vectors(), road=road)) == [
        "layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"
    ]  # fmt: skip


@on_both_roads
def test_a_branch_of_loose_maps_has_not_the_name_of_its_norm(road: str) -> None:
    assert names(trace(ready(Loose()), vectors(), road=road)) == ["@0", "@1"]


def test_what_lies_above_another_gives_way_to_the_module_that_ends_it_only() -> None:
    experts = ["mlp.gate.weight", "mlp.gate.statics.bias", "mlp.experts.down"]
    attention = ["0.norm.gate.weight", "0.attn.q.weight", "0.attn.o.weight"]

    assert deeper({1: ("mlp", experts), 2: ("mlp.shared", ["mlp.shared.up.weight"])}) == {}
    assert deeper({1: ("0", attention), 2: ("0.mlp", ["0.mlp.up.weight"])}) == {1: "0.attn"}


class Angles(Decoder):
    """Every attention turns its input by a table that belongs to the whole model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0, 1, 5 * WIDTH).view(5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        for layer in self.layers:
            normed = layer.attn_norm(h)
            h = h + layer.attn(torch.cos(self.table[: x.shape[1]]) * normed + normed)
            h = h + layer.mlp(layer.mlp_norm(h))
        return h


@on_both_roads
def test_buffers_of_the_whole_model_take_no_name_away(road: str) -> None:
    traced = trace(ready(Angles()), vectors(), road=road)

    assert names(traced) == [f"layers.{index}.{part}" for index in range(Angles.depth) for part in ("attn", "mlp")]


@on_both_roads
def test_branches_of_one_module_are_numbered_in_stream_order(road: str) -> None:
    traced = trace(ready(Tied()), vectors(), road=road)

    assert names(traced) == ["layers.0.attn", "@1", "layers.1.attn", "layers.1.mlp", "layers.2.attn", "@5"]
    one, other = traced["@1"], traced["@5"]
    assert one.kind == other.kind == "gated_ffn"
    assert {n.name for n in one.parameters} & {n.name for n in other.parameters}


def test_a_branch_without_weights_is_numbered() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x * 1.5
            for _ in range(2):
                h = h + F.scaled_dot_product_attention(h, h, h)
            return h

    assert names(trace(Bare(), vectors())) == ["@0", "@1"]


class Adapter(nn.Module):
    """LoRA: a linear map, and beside it a product of two thin ones."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_a = nn.Linear(base.in_features, 2, bias=False)
        self.lora_b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x)) * 0.5


@on_both_roads
def test_an_adapter_on_the_last_projection_is_a_second_term_of_one_branch(road: str) -> None:
    body = SwiGLU()
    body.down = Adapter(body.down)
    traced = trace(ready(Stream(SwiGLU(), body)), vectors(), road=road)

    branch = traced["layers.1.body"]

    assert len(branch.terms) == 2
    assert branch.kind == "other"
    assert branch.ffn is None
    assert "adapter" in branch.reason


@on_both_roads
def test_an_adapter_on_the_gate_is_a_reason(road: str) -> None:
    body = SwiGLU()
    body.gate = Adapter(body.gate)
    traced = trace(ready(Stream(SwiGLU(), body)), vectors(), road=road)

    branch = traced["layers.1.body"]

    assert len(branch.terms) == 1
    assert branch.kind == "other"
    assert branch.reason == REASON


class WholeAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = SwiGLU()
        self.lora = nn.Sequential(nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora(x)


@on_both_roads
def test_an_adapter_beside_a_whole_ffn_is_a_branch_of_its_own(road: str) -> None:
    traced = trace(ready(Stream(WholeAdapter())), vectors(), road=road)

    assert names(traced) == ["layers.0.body.base", "layers.0.body.lora"]
    assert traced["layers.0.body.base"].kind == "gated_ffn"
    assert traced["layers.0.body.lora"].read is traced["layers.0.body.base"].read


class Cached(Block):
    """Writes its keys and values to buffers, and attends to those by the buffers' own names."""

    def __init__(self) -> None:
        super().__init__()
        self.attn.register_buffer("keys", torch.zeros(2, 2, 6, WIDTH // 2))
        self.attn.register_buffer("values", torch.zeros(2, 2, 6, WIDTH // 2))

    def attend(self, h: Tensor, position: Tensor) -> Tensor:
        x = self.attn_norm(h)
        key, value = self.attn.key_value(x)
        self.attn.keys.index_copy_(2, position, key)
        self.attn.values.index_copy_(2, position, value)
        return self.attn.attend(x, self.attn.keys, self.attn.values, causal=False)


class CachedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Cached() for _ in range(2))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        h = x * 1.5
        for layer in self.layers:
            h = h + layer.attend(h, position)
            h = h + layer.mlp(layer.mlp_norm(h))
        return h


@on_both_roads
def test_what_an_attention_writes_to_its_cache_belongs_to_it(road: str) -> None:
    traced = trace(ready(CachedDecoder()), vectors(), torch.arange(3), road=road)
    simplify(traced.gm)

    assert names(traced) == ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"]
    branch = traced["layers.0.attn"]
    assert branch.kind == "attention"
    own = [f"layers.0.attn.{part}" for part in ("k.weight", "keys", "o.weight", "q.weight", "v.weight", "values")]
    assert weights(traced, "layers.0.attn") == [*own, "layers.0.attn_norm.weight"]
    assert not branch.foreign


@on_both_roads
def test_a_stamped_branch_keeps_its_name_whatever_becomes_of_its_neighbours(road: str) -> None:
    traced = trace(ready(Tied()), vectors(), road=road)
    simplify(traced.gm)
    stamp(traced.stream.branches)

    drop(traced.gm, ["layers.0.attn", "@1"])

    assert names(traced) == ["layers.1.attn", "layers.1.mlp", "layers.2.attn", "@5"]
    assert [branch.terms[0].node.meta[STAMP] for branch in traced.stream.branches] == names(traced)


def test_the_caller_may_know_the_names_better_than_the_graph() -> None:
    model = ready(Stream(Layer(SwiGLU())))
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model.layers[0], backend=backend)(vectors())
    (gm,) = graphs
    (alone,) = find_streams(gm)
    better = {
        node: name.replace("L['self']", "")
        for node in gm.graph.find_nodes(op="placeholder")
        for name in [f"model.layers.7.mlp.{node.name}"]
        if "weight" in node.name and "norm" not in node.name
    }

    (informed,) = find_streams(gm, better)

    assert [branch.name for branch in alone.branches] == ["body"]
    assert [branch.name for branch in informed.branches] == ["model.layers.7.mlp"]
