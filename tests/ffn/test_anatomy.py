"""An FFN is recognised in every spelling, its anatomy is what it computes, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxfuse.ffn.affine import Factor
from fxfuse.ffn.anatomy import FFN
from fxfuse.ffn.projection import Projection
from fxfuse.graph.slices import Rows
from fxfuse.passes import simplify
from fxfuse.stream.branch import Branch
from tests.models import spec as s
from tests.models.blocks import (
    GPT2MLP,
    HIDDEN,
    MLP,
    WIDTH,
    Attention,
    Layer,
    PackedSwiGLU,
    Stream,
    SwiGLU,
    Traced,
    on_both_roads,
    ready,
    trace,
    vectors,
)
from tests.models.bodies import FFNBody
from tests.models.norms import make_norm


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return value


@torch.no_grad()
def values(traced: Traced) -> dict[fx.Node, Tensor]:
    recorder = Recorder(traced.gm, garbage_collect_values=False)
    recorder.values = {}
    recorder.run(*traced.inputs)
    return recorder.values


def applied(projection: Projection, at: dict[fx.Node, Tensor], x: Tensor) -> Tensor:
    """What the fields of a projection say that it makes of ``x``."""
    weight = at[projection.weight].T if projection.transposed else at[projection.weight]
    bias = at[projection.bias] if projection.bias is not None else torch.zeros(len(weight)).to(weight)
    rows = projection.rows.cut if projection.rows else slice(None)
    assert len(weight[rows]) == projection.width
    return F.linear(x, weight[rows], bias[rows])


def multiplied(x: Tensor, factor: Factor, at: dict[fx.Node, Tensor]) -> Tensor:
    for gain in factor.gains:
        x = x * at[gain]
    for divisor in factor.divisors:
        x = x / at[divisor]
    return x * factor.number


def assert_anatomy(branch: Branch, at: dict[fx.Node, Tensor]) -> None:
    """Every field of the FFN says what the graph computes there."""
    ffn = branch.ffn
    assert isinstance(ffn, FFN), branch.reason
    assert branch.reason == ""
    close = {"rtol": 1e-12, "atol": 1e-12}
    x, bare = at[ffn.normed.output], at[ffn.normed.bare]
    if ffn.normed.fused_call:
        assert len(ffn.normed.steps) > 1 or torch.equal(bare, x)
    else:
        shift = sum(multiplied(at[each.node], each.factor, at) for each in ffn.normed.shifts)
        torch.testing.assert_close((multiplied(bare, ffn.normed.factor, at) + shift).view_as(x), x, **close)
    for projection in (*ffn.projections, ffn.down):
        source = at[projection.input]
        torch.testing.assert_close(
            applied(projection, at, source).view_as(at[projection.output]), at[projection.output], **close
        )
    out = at[ffn.down.output] * ffn.scale.number
    for gain in ffn.gains:
        out = out * at[gain]
    torch.testing.assert_close(out.view_as(at[branch.terms[0].node]), at[branch.terms[0].node], **close)
    assert set(ffn.middle) <= branch.nodes
    assert {projection.output for projection in ffn.projections} <= branch.nodes


# Every spelling of the generated models that is an FFN of the form down(middle(p(x), ...)).
FFNS: dict[str, s.FFN] = {
    "swiglu": s.FFN(),
    "swiglu, up first": s.FFN(up_first=True),
    "swiglu with biases": s.FFN(bias=(True, True, True)),
    "swiglu with a gate bias": s.FFN(bias=(True, False, False)),
    "swiglu as a module": s.FFN(activation="silu_module"),
    "swiglu by sigmoid": s.FFN(activation="silu_sigmoid"),
    "swiglu by exp": s.FFN(activation="silu_exp"),
    "geglu": s.FFN(activation="gelu"),
    "geglu, tanh": s.FFN(activation="gelu_tanh"),
    "quick gelu": s.FFN(activation="quick_gelu"),
    "packed, chunk": s.FFN(layout="gate_up_chunk"),
    "packed, chunk, up first": s.FFN(layout="up_gate_chunk", bias=(True, True, True)),
    "packed, split": s.FFN(layout="gate_up_split"),
    "packed, slices": s.FFN(layout="gate_up_slice", bias=(True, True, False)),
    "packed, interleaved": s.FFN(layout="interleaved"),
    "packed, overlapping": s.FFN(layout="overlap"),
    "an inner multiplier": s.FFN(gate_scale=0.5),
    "flattened to two dimensions": s.FFN(flat=True),
    "plain": s.FFN(gated=False, activation="gelu"),
    "plain relu with biases": s.FFN(gated=False, activation="relu", bias=(False, True, True)),
}


@on_both_roads
def test_every_spelling_of_an_ffn_is_recognised_for_what_it_computes(road: str) -> None:
    model = Stream(*(FFNBody(spec, WIDTH) for spec in FFNS.values()))

    traced = trace(ready(model), vectors(), road=road)

    at = values(traced)
    branches = traced.stream.branches
    for (name, spec), branch in zip(FFNS.items(), branches, strict=True):
        assert branch.kind == ("gated_ffn" if spec.gated else "ffn"), (name, branch.reason)
        assert branch.ffn is not None
        assert len(branch.ffn.projections) == (2 if spec.gated else 1)
        assert {projection.width for projection in branch.ffn.projections} == {spec.hidden}
        assert_anatomy(branch, at)


def test_a_gate_and_an_up_are_told_apart_by_their_rows() -> None:
    model = Stream(*(FFNBody(s.FFN(hidden=4, layout=layout), WIDTH) for layout in ("gate_up_chunk", "up_gate_chunk")))

    first, second = trace(ready(model), vectors()).stream.branches

    assert first.ffn is not None
    assert second.ffn is not None
    assert [p.rows for p in first.ffn.projections] == [Rows(0, 4), Rows(4, 8)]
    assert [p.rows for p in second.ffn.projections] == [Rows(4, 8), Rows(0, 4)]
    assert first.ffn.projections[0].weight is first.ffn.projections[1].weight


NORMS: dict[s.NormKind, tuple[bool, bool]] = {  # whether there is a gain and a shift to fold
    "rms_hf": (True, False),
    "rms_gain_after_cast": (True, False),
    "rms_gain_plus_one": (True, False),
    "rms_functional": (True, False),
    "rms_rsqrt": (True, False),
    "rms_sqrt": (True, False),
    "rms_module": (True, False),
    "rms_parameterless": (False, False),
    "layer_norm": (True, True),
    "layer_norm_no_bias": (True, False),
    "layer_norm_parameterless": (False, False),
    "none": (False, False),
}


@on_both_roads
def test_gain_and_shift_are_taken_off_every_norm(road: str) -> None:
    model = Stream(*(Layer(SwiGLU(), make_norm(s.Norm(kind), WIDTH)) for kind in NORMS))

    traced = trace(ready(model), vectors(), road=road)

    at = values(traced)
    for (kind, expected), branch in zip(NORMS.items(), traced.stream.branches, strict=True):
        assert_anatomy(branch, at)
        assert branch.ffn is not None
        normed = branch.ffn.normed
        assert (len(normed.factor.gains), len(normed.shifts)) == expected, kind


def test_a_gain_of_one_plus_w_is_one_weight_only_value() -> None:
    traced = trace(ready(Stream(Layer(SwiGLU(), make_norm(s.Norm("rms_gain_plus_one"), WIDTH)))), vectors())

    ffn = traced["layers.0.body"].ffn

    assert ffn is not None
    (gain,) = ffn.normed.factor.gains
    torch.testing.assert_close(values(traced)[gain], 1 + dict(traced_weights(traced))["layers.0.norm.weight"])


def traced_weights(traced: Traced) -> list[tuple[str, Tensor]]:
    placeholders = traced.gm.graph.find_nodes(op="placeholder")
    return [(traced.names[n], v) for n, v in zip(placeholders, traced.inputs, strict=True) if n in traced.names]


class MatmulFFN(nn.Module):
    """Weights as parameters of their own; products spelled @, biases added by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(WIDTH, HIDDEN))
        self.w2 = nn.Parameter(torch.empty(HIDDEN, WIDTH))
        self.b1_bias = nn.Parameter(torch.empty(HIDDEN))
        self.b2_bias = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(torch.relu(x @ self.w1 + self.b1_bias).square(), self.w2) + self.b2_bias


class Casting(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.float32).to(torch.float64)).to(torch.float64)


class Clamped(SwiGLU):
    """GPT-OSS's: clamps, a sigmoid with a factor, and (up + 1)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x).clamp(max=7.0), self.up(x).clamp(min=-7.0, max=7.0)
        return self.down((up + 1) * (gate * torch.sigmoid(gate * 1.702)))


class Bilinear(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x) * self.up(x))


class ThreeArms(SwiGLU):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x) + torch.tanh(self.third(x)))


class XIELU(MLP):
    """Apertus': an activation with learned numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.register_buffer("eps", torch.tensor(-1e-6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        positive, negative = F.softplus(self.positive), 0.5 + F.softplus(self.negative)
        below = (torch.expm1(torch.minimum(x, self.eps)) - x) * negative + 0.5 * x
        return self.down(torch.where(x > 0, positive * x * x + 0.5 * x, below))


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a gain for each channel of the output": (
        lambda: Wrapped(lambda m, f, x: f * m.gamma, gamma=nn.Parameter(torch.ones(WIDTH))),
        "gated_ffn",
    ),
    "a gain and a factor in any order": (
        lambda: Wrapped(
            lambda m, f, x: m.gamma * (0.5 * (f * m.beta)),
            gamma=nn.Parameter(torch.ones(1, 1, WIDTH)),
            beta=nn.Parameter(torch.ones(())),
        ),
        "gated_ffn",
    ),
    "an activation with a parameter": (lambda: Activated(), "ffn"),
    "an activation with several": (XIELU, "ffn"),
    "an activation with one for each unit": (
        lambda: Inside(lambda m, y: y * m.alpha, alpha=nn.Parameter(torch.ones(HIDDEN))),
        "gated_ffn",
    ),
    "conv1d of gpt-2": (GPT2MLP, "ffn"),
    "matmul and bias by hand": (MatmulFFN, "ffn"),
    "idle dropout inside": (lambda: MLP(activation=lambda x: F.dropout(F.gelu(x), 0.1, False)), "ffn"),
    "casts": (Casting, "gated_ffn"),
    "clamps and offsets": (Clamped, "gated_ffn"),
    "no activation": (Bilinear, "gated_ffn"),
    "three projections": (ThreeArms, "gated_ffn"),
    "narrow": (lambda: Narrow(), "gated_ffn"),
    "one projection used twice": (lambda: MLP(activation=lambda x: x * torch.sigmoid(x) + x.relu()), "ffn"),
}


class Narrow(PackedSwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        packed = self.gate_up(x)
        return self.down(F.silu(packed.narrow(-1, 0, HIDDEN)) * packed[:, :, HIDDEN:])


@on_both_roads
def test_ffns_of_other_houses_are_recognised_too(road: str) -> None:
    model = Stream(*(make() for make, _ in OTHERS.values()))

    traced = trace(ready(model), vectors(), road=road)

    at = values(traced)
    for (name, (_, kind)), branch in zip(OTHERS.items(), traced.stream.branches, strict=True):
        assert branch.kind == kind, (name, branch.reason)
        if name != "casts":  # which round
            assert_anatomy(branch, at)


class Wrapped(nn.Module):
    """Something around an FFN."""

    def __init__(self, after: Callable[[nn.Module, Tensor, Tensor], Tensor], **own: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.mlp = SwiGLU()
        self.after = after
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self, self.mlp(x), x)


class Inside(SwiGLU):
    """Something between the hidden units and the down projection."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Tensor], **own: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.change = change
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.change(self, F.silu(self.gate(x)) * self.up(x)))


class GatedBy(SwiGLU):
    """The gate goes through ``gate`` before it meets the up."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.gate(x)) * self.up(x))


class OtherInput(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(torch.tanh(x)))


class Activated(MLP):
    """Apertus' xIELU in small: an activation with a learned parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)) * self.alpha)


def trained(x: Tensor) -> Tensor:
    return F.dropout(x, 0.25, True)


# FFNs and near FFNs that no wide FFN can hold, with the words that must tell why.
UNFUSABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "post-norm": (lambda: Wrapped(lambda m, f, x: m.post(f), post=nn.RMSNorm(WIDTH)), "norm (sandwich or post-norm)"),
    "post-norm by hand": (
        lambda: Wrapped(lambda m, f, x: m.post(f), post=make_norm(s.Norm("rms_hf"), WIDTH)),
        "norm (sandwich or post-norm)",
    ),
    "a gain of several values a channel": (
        lambda: Wrapped(lambda m, f, x: f * m.gamma, gamma=nn.Parameter(torch.ones(3, WIDTH))),
        "a product of two values",
    ),
    "dropout after": (lambda: Wrapped(lambda m, f, x: trained(f)), "dropout with p=0.25"),
    "dropout inside": (
        lambda: Inside(lambda m, y: trained(y)),
        "dropout with p=0.25 is active inside it (training mode)",
    ),
    "a gate on the output": (
        lambda: Wrapped(lambda m, f, x: torch.sigmoid(m.out(x)) * f, out=nn.Linear(WIDTH, WIDTH)),
        "gate on the output",
    ),
    "a gate of one number": (
        lambda: Wrapped(lambda m, f, x: torch.sigmoid(m.out(x)) * f, out=nn.Linear(WIDTH, 1)),
        "gate on the output",
    ),
    "a norm of the hidden units": (lambda: Inside(lambda m, y: m.n(y), n=nn.RMSNorm(HIDDEN)), "mixes units or tokens"),
    "softmax of the gate": (lambda: GatedBy(lambda g: torch.softmax(g, -1)), "softmax"),
    "a shift of tokens": (lambda: Inside(lambda m, y: y.roll(1, 1)), "mixes units or tokens"),
    "a shuffle of units": (lambda: Inside(lambda m, y: y.flip(-1)), "mixes units or tokens"),
    "top-k of units": (lambda: GatedBy(lambda g: F.relu(g - g.mean(-1, keepdim=True))), "mean"),
    "an activation with parameters for each token": (
        lambda: Inside(lambda m, y: y * m.alpha, alpha=nn.Parameter(torch.ones(3, HIDDEN))),
        "parameters that are not one a hidden unit",
    ),
    "an activation with a number of another dtype": (
        lambda: Inside(lambda m, y: y * m.alpha.float(), alpha=nn.Parameter(torch.ones(()))),
        "of another dtype",
    ),
    "two inputs": (OtherInput, "projections read different values"),
    "a write in place": (lambda: GatedBy(lambda g: F.silu(g, inplace=True)), "writes in place"),
    "a write in place by position": (lambda: GatedBy(nn.ELU(inplace=True)), "writes in place"),
    "one linear map": (lambda: nn.Linear(WIDTH, WIDTH), ""),
}


HALF = {
    "post-norm",
    "post-norm by hand",
    "a gain of several values a channel",
    "a gate on the output",
    "a gate of one number",
    "a norm of the hidden units",
    "softmax of the gate",
    "top-k of units",
    "an activation with parameters for each token",
    "an activation with a number of another dtype",
}
"""Those of them whose gate and up can still be shared with others': nothing mixes tokens, draws or writes."""


@on_both_roads
def test_what_cannot_be_wide_says_why_in_words(road: str) -> None:
    model = Stream(*(make() for make, _ in UNFUSABLE.values()))

    stream = trace(ready(model), vectors(), road=road).stream

    for (name, (_, words)), branch in zip(UNFUSABLE.items(), stream.branches, strict=True):
        assert branch.ffn is None, name
        kind = "linear" if name == "one linear map" else "other"
        assert branch.kind == ("gated_ffn" if name in HALF else kind), name
        assert (branch.gate_up is not None) == (name in HALF), name
        assert branch.reason, name
        if not (road == "export" and "position" in name):  # aten.elu_ has no name here, so it is described by its own
            assert words in branch.reason, (name, branch.reason)


class OutputGate(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.key_value(x)
        mixed = F.scaled_dot_product_attention(self.heads(self.q(x)), key, value, is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(x.shape) * torch.sigmoid(self.gate(x)))


class ByHand(Attention):
    def forward(self, x: Tensor) -> Tensor:
        key, value = self.key_value(x)
        scores = self.heads(self.q(x)) @ key.transpose(-1, -2) / 2
        mixed = torch.softmax(scores, -1) @ value
        return self.o(mixed.transpose(1, 2).reshape(x.shape))


class Linear(Attention):
    """Linear attention: no softmax, the sum over keys first."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)
        return self.o(torch.einsum("bnd,bde->bne", q, torch.einsum("bnd,bne->bde", k, v)))


class Recurrent(Attention):
    """Linear attention as a running sum of outer products: pointwise ops only, but for the cumsum."""

    def forward(self, x: Tensor) -> Tensor:
        state = (self.k(x).unsqueeze(-1) * self.v(x).unsqueeze(-2)).cumsum(1)
        return self.o((F.silu(self.q(x)).unsqueeze(-1) * state).sum(2))


class GatedConv(nn.Module):
    """A gated convolution (Mamba's and LFM2's mixers): a packed projection, a product, an output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, gate = self.inp(x).chunk(2, -1)
        a = self.conv(a.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.out(a * F.silu(gate))


class TokenMLP(nn.Module):
    """MLP-Mixer's: an MLP over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Averaged(SwiGLU):
    """A gate that sees the mean of all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)).mean(1, keepdim=True) * self.up(x))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(SwiGLU() for _ in range(3))

    def weights(self, x: Tensor) -> Tensor:
        chosen, index = torch.topk(torch.softmax(self.router(x), -1), 2, -1)
        return torch.zeros_like(self.router(x)).scatter(-1, index, chosen)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            out = out + expert(x) * weights[..., index : index + 1]
        return out


class IndexedRouter(Router):
    """Mixtral's: the experts' outputs are added in place, and the sum is read by its first name."""

    def forward(self, x: Tensor) -> Tensor:
        weights, out = self.weights(x).view(-1, 3), torch.zeros_like(x).view(-1, WIDTH)
        every = torch.arange(out.shape[0])
        for index, expert in enumerate(self.experts):
            out.index_add_(0, every, expert(x).view(-1, WIDTH) * weights[:, index : index + 1])
        return out.view(x.shape)


class SoftExperts(Router):
    def weights(self, x: Tensor) -> Tensor:
        return torch.softmax(self.router(x), -1)


NO_FFNS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention": (Attention, "attention"),
    "attention by hand": (ByHand, "attention"),
    "attention with an output gate": (OutputGate, "attention"),
    "linear attention": (Linear, "other"),
    "recurrent attention": (Recurrent, "other"),
    "gated convolution": (GatedConv, "other"),
    "an MLP over tokens": (TokenMLP, "other"),
    "a gate that sees all tokens": (Averaged, "other"),
    "routed experts": (Router, "moe"),
    "experts added in place": (IndexedRouter, "moe"),
    "softly mixed experts": (SoftExperts, "other"),
}


@on_both_roads
def test_what_is_no_ffn_is_never_taken_for_one(road: str) -> None:
    model = Stream(*(make() for make, _ in NO_FFNS.values()))
    traced = trace(ready(model), vectors(), road=road)
    simplify(traced.gm)

    stream = traced.stream

    for index, (name, (_, kind)) in enumerate(NO_FFNS.items()):
        branch = stream.branches[index]
        assert branch.name.startswith(f"layers.{index}.body"), name
        assert branch.ffn is None, name
        assert branch.kind == kind, name
        assert branch.reason, name
    assert len(stream.branches) == len(NO_FFNS)


def test_an_ffn_on_what_another_layer_made_of_the_stream_is_not_wide() -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mlp = nn.Linear(WIDTH, WIDTH), SwiGLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(torch.tanh(self.first(x)))

    branch = trace(ready(Stream(Behind())), vectors())["layers.0.body"]

    assert branch.ffn is None
    assert branch.reason == "its input is not the stream but what another layer made of it"
