"""Every style of FFN that models are made of, and what two of them become that stand in parallel.

"wide" is one wide FFN; "gate_up" is one GEMM for the projections of both, each going on by itself, with the reason; any
other text is the reason why they stay as they are. The planned graph always computes what its modules do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfuse import Plan
from fxfuse.passes import REPORTS, PassReport, apply_plan
from tests.models import spec as s
from tests.models.blocks import (
    GLU,
    GPT2MLP,
    HIDDEN,
    MLP,
    WIDTH,
    Attention,
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
from tests.models.norms import make_norm


def tensor_split_glu(x: Tensor) -> Tensor:
    gate, up = x.tensor_split(2, -1)
    return F.silu(gate) * up


class Matrices(nn.Module):
    """Two matrices, and how they are applied: ``up(x, w)`` and ``down(x, w)``."""

    def __init__(self, *products: Callable[[Tensor, Tensor], Tensor], shapes: str = "[out, in]") -> None:
        super().__init__()
        sizes = [(HIDDEN, WIDTH), (WIDTH, HIDDEN)]
        turned = [size[::-1] if shapes == "[in, out]" else size for size in sizes]
        self.w1, self.w2 = (nn.Parameter(torch.empty(size)) for size in turned)
        self.products = products

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.products
        return down(F.gelu(up(x, self.w1)), self.w2)


class Changed(SwiGLU):
    """A SwiGLU with something done to its hidden units and to its output."""

    def __init__(
        self,
        inside: Callable[[nn.Module, Tensor], Tensor] = lambda m, y: y,
        after: Callable[[nn.Module, Tensor, Tensor], Tensor] = lambda m, f, x: f,
        **own: nn.Module | nn.Parameter,
    ) -> None:
        super().__init__()
        self.inside, self.after = inside, after
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inside(self, F.silu(self.gate(x)) * self.up(x))
        return self.after(self, self.down(hidden), x)


class Glm(PackedSwiGLU):
    """Packed, and a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.post = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.post(super().forward(x))


class TopK(SwiGLU):
    """Gemma3n's: only units well above the mean of their token pass."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        cutoff = torch.mean(gate, dim=-1, keepdim=True) + 0.2 * torch.std(gate, dim=-1, keepdim=True, unbiased=False)
        return self.down(F.gelu(F.relu(gate - cutoff)) * self.up(x))


class XIELU(MLP):
    """Apertus': an activation with learned numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.register_buffer("eps", torch.tensor(-1e-6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        positive, negative = F.softplus(self.positive), 0.5 + F.softplus(self.negative)
        below = (torch.expm1(torch.min(x, self.eps)) - x) * negative + 0.5 * x
        return self.down(torch.where(x > 0, positive * x * x + 0.5 * x, below))


class Clamped(SwiGLU):
    """GPT-OSS': clamps, a sigmoid with a factor, and (up + 1)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x).clamp(max=7.0), self.up(x).clamp(min=-7.0, max=7.0)
        return self.down((up + 1) * (gate * torch.sigmoid(gate * 1.702)))


class Beside(Layer):
    """An attention and an FFN that read one norm (Cohere, GPT-J), or each its own (GPT-NeoX)."""

    def __init__(self, own_norm: bool) -> None:
        super().__init__(MLP() if own_norm else SwiGLU(), nn.LayerNorm(WIDTH))
        self.attn = Attention()
        self.attn_norm = nn.LayerNorm(WIDTH) if own_norm else self.norm

    def rest(self, h: Tensor) -> Tensor:
        return self.attn(self.attn_norm(h))

    def forward(self, h: Tensor) -> Tensor:
        return self.branch(h) + self.rest(h) + h


class Routed(nn.Module):
    """Two of three experts for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(SwiGLU() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen, index = torch.topk(torch.softmax(self.router(x), -1), 2, -1)
        weights = torch.zeros_like(self.router(x)).scatter(-1, index, chosen)
        return sum(expert(x) * weights[..., i : i + 1] for i, expert in enumerate(self.experts))


class Shared(Layer):
    """Routed experts and one that all tokens share (DeepSeek); ``gated`` by the token (Qwen2-MoE)."""

    def __init__(self, gated: bool = False) -> None:
        gate = {"out": nn.Linear(WIDTH, 1)} if gated else {}
        super().__init__(Changed(after=lambda m, f, x: torch.sigmoid(m.out(x)) * f if gated else f, **gate))
        self.routed = Routed()

    def rest(self, h: Tensor) -> Tensor:
        return self.routed(self.norm(h))

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        return h + (self.routed(x) + self.body(x))


class SharedByRows(Shared):
    """On rows, which take the stream's shape only when they are added (Llama 4, Ernie 4.5)."""

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h).reshape(-1, h.shape[-1])
        return h + (self.routed(x) + self.body(x)).view(h.shape)


TIED = nn.Linear(WIDTH, HIDDEN, bias=False)


class Tied(SwiGLU):
    """All of them have one gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = TIED


def bare(spec: s.FFN) -> Callable[[], Layer]:
    return lambda: Layer(FFNBody(spec, WIDTH))


def under(norm: s.NormKind, body: Callable[[], nn.Module] = SwiGLU) -> Callable[[], Layer]:
    return lambda: Layer(body(), make_norm(s.Norm(norm), WIDTH))


def scaled(scale: float, body: Callable[[], nn.Module] = SwiGLU) -> Callable[[], Layer]:
    return lambda: Layer(body(), add=lambda h, f: h + f * scale)


def vector(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(sizes))


@dataclass(frozen=True)
class Style:
    """Two layers of it, and what becomes of their FFNs."""

    make: Callable[[], Layer | nn.Module]
    becomes: str
    why: str = ""


WIDE: dict[str, Callable[[], Layer | nn.Module]] = {
    "swiglu": SwiGLU,
    "swiglu with biases": lambda: SwiGLU(bias=True),
    "geglu": bare(s.FFN(activation="gelu")),
    "geglu, tanh": bare(s.FFN(activation="gelu_tanh")),
    "reglu": bare(s.FFN(activation="relu")),
    "glu": GLU,
    "glu as a module": lambda: GLU(nn.GLU()),
    "plain gelu": MLP,
    "plain relu squared": lambda: MLP(activation=lambda x: F.relu(x).square()),
    "packed, gate first": lambda: PackedSwiGLU(bias=True),
    "packed, up first": bare(s.FFN(layout="up_gate_chunk")),
    "packed, interleaved": bare(s.FFN(layout="interleaved")),
    "clamped": Clamped,
    "layer norm": under("layer_norm", lambda: SwiGLU(bias=True)),
    "layer norm without parameters": under("layer_norm_parameterless"),
    "rms norm in float32": under("rms_hf"),
    "rms norm with a gain of 1 + w": under("rms_gain_plus_one"),
    "rms norm without parameters": under("rms_parameterless"),
    "no norm": under("none"),
    "multiplied output": scaled(0.22),
    "multiplied gate": bare(s.FFN(gate_scale=0.5)),
    "a gain for each channel of the output": lambda: Changed(after=lambda m, f, x: f * m.gamma, gamma=vector(WIDTH)),
    "a learned number on the output": lambda: Changed(after=lambda m, f, x: m.gamma * f, gamma=vector()),
    "attention beside it, one norm": lambda: Beside(own_norm=False),
    "attention beside it, two norms": lambda: Beside(own_norm=True),
    "flattened to two dimensions": bare(s.FFN(flat=True, bias=(True, True, True))),
    "conv1d of gpt-2": GPT2MLP,
    "x @ w": lambda: Matrices(torch.matmul, torch.matmul, shapes="[in, out]"),
    "x @ w.T": lambda: Matrices(lambda x, w: x @ w.T, lambda x, w: x @ w.transpose(0, 1)),
    "einsum": lambda: Matrices(
        lambda x, w: torch.einsum("bsd,fd->bsf", x, w), lambda x, w: torch.einsum("df, ...f -> ...d", w, x)
    ),
    "einsum of [in, out]": lambda: Matrices(
        lambda x, w: torch.einsum("bsd,df->bsf", x, w), lambda x, w: torch.einsum("...f,fd->...d", x, w),
        shapes="[in, out]",
    ),
    "packed, split by tensor_split": lambda: GLU(tensor_split_glu),
    "units masked": lambda: MLP(activation=lambda x: x.masked_fill(x < 0.1, 0.0)),
    "added as the sum of a stack": lambda: Layer(SwiGLU(), add=lambda h, f: torch.stack([h, f]).sum(0)),
    "activation with learned numbers": XIELU,
    "activation with a number for each unit": lambda: Changed(inside=lambda m, y: y * m.alpha, alpha=vector(HIDDEN)),
    "idle dropout": lambda: MLP(activation=lambda x: F.dropout(F.gelu(x), 0.1, False)),
    "shared expert beside routed ones": Shared,
    "shared expert beside routed ones, on rows": lambda: SharedByRows(),
    "one gate for both": lambda: Tied(),
}  # fmt: skip

SANDWICH = "a norm (sandwich or post-norm)"
OTHERS: dict[str, Style] = {
    "sandwich": Style(lambda: Changed(after=lambda m, f, x: m.post(f), post=nn.RMSNorm(WIDTH)), "gate_up", SANDWICH),
    "sandwich by hand": Style(
        lambda: Changed(after=lambda m, f, x: m.post(f), post=make_norm(s.Norm("rms_gain_plus_one"), WIDTH)),
        "gate_up", SANDWICH,
    ),
    "sandwich, packed": Style(Glm, "gate_up", SANDWICH),
    "post-norm, nothing before": Style(
        lambda: Layer(Changed(after=lambda m, f, x: m.post(f), post=nn.RMSNorm(WIDTH)), nn.Identity()),
        "gate_up", SANDWICH,
    ),
    "sub-norm": Style(lambda: Changed(inside=lambda m, y: m.n(y), n=nn.RMSNorm(HIDDEN)), "gate_up", SANDWICH),
    "sub-norm, plain": Style(
        lambda: MLP(activation=lambda x: F.layer_norm(F.gelu(x), (HIDDEN,))), "gate_up", SANDWICH
    ),
    "statistics over the units": Style(TopK, "gate_up", "mean"),
    "softmax over the units": Style(lambda: Changed(inside=lambda m, y: y.softmax(-1)), "gate_up", "softmax"),
    "gated output": Style(
        lambda: Changed(after=lambda m, f, x: torch.sigmoid(m.out(x)) * f, out=nn.Linear(WIDTH, WIDTH)),
        "gate_up", "a gate on the output",
    ),
    "gated shared expert": Style(lambda: Shared(gated=True), "gate_up", "a gate on the output"),
    "gain for each position": Style(
        lambda: Changed(after=lambda m, f, x: f * m.gamma, gamma=vector(3, WIDTH)), "gate_up", "a product of two values"
    ),
    "output in integers": Style(
        lambda: Changed(after=lambda m, f, x: (8 * f).to(torch.int32).to(f.dtype)), "gate_up", "projection but cast"
    ),
    "output in float8": Style(
        lambda: Changed(after=lambda m, f, x: f.to(torch.float8_e4m3fn).to(f.dtype)), "gate_up", "projection but cast"
    ),
    "dropout in training": Style(
        lambda: MLP(activation=lambda x: F.dropout(F.gelu(x), 0.25, True)), "", "dropout with p=0.25"
    ),
    "routed experts": Style(Routed, "", "routed experts"),
    "attention": Style(Attention, "", "attention"),
}  # fmt: skip

STYLES = {name: Style(make, "wide") for name, make in WIDE.items()} | OTHERS


def side_by_side(model: Stream, x: Tensor) -> Tensor:
    """The plan's meaning: both FFNs read the stream where the first stands, and are added there."""
    first, second = model.layers
    h = start = model.start(x)
    for layer in (first, second):
        h = layer.add(h, layer.branch(start))
    rest = [getattr(layer, "rest", torch.zeros_like) for layer in (first, second)]
    h = h + rest[0](start)
    return h + rest[1](h)


def report(gm: torch.fx.GraphModule, name: str) -> PassReport:
    (found,) = [each for each in gm.meta[REPORTS] if each.name == name]
    return found


@on_both_roads
@pytest.mark.parametrize("name", STYLES)
def test_two_of_a_style_become_what_they_can(name: str, road: str) -> None:
    style = STYLES[name]
    model = ready(Stream(style.make(), style.make()))
    traced = trace(model, vectors(), road=road)
    ffns = ["layers.0.body", "layers.1.body"]

    apply_plan(traced.gm, Plan(parallel=[ffns]), names=traced.names, strict=True)

    torch.manual_seed(3)
    got = traced()
    torch.manual_seed(3)
    assert_same(got, side_by_side(model, vectors()))
    assert_no_dead_nodes(traced.gm)
    wide, merged = report(traced.gm, "fuse_ffn"), report(traced.gm, "merge_gate_up")
    assert [edit.branches for edit in wide.done] == ([tuple(ffns)] if style.becomes == "wide" else [])
    assert [edit.branches for edit in merged.done] == ([tuple(ffns)] if style.becomes == "gate_up" else [])
    if style.becomes == "gate_up":
        assert style.why in merged.done[0].detail
    elif not style.becomes:
        assert {branch.reason for branch in traced.stream.branches if branch.name in ffns} != {""}
        assert all(style.why in branch.reason for branch in traced.stream.branches if branch.name in ffns)
