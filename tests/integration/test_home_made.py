"""Modules as people write them at home: each is understood, or left alone with a reason, and computed exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfuse
from fxfuse import Plan
from tests.models.checks import assert_exact
from tests.models.tiny import redraw

WIDTH, HIDDEN = 8, 12


class Attention(nn.Module):
    """The softmax written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, WIDTH).unbind(2)
        scores = torch.einsum("bid,bjd->bij", q, k) / WIDTH**0.5
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return self.out(torch.einsum("bij,bjd->bid", weights / weights.sum(-1, keepdim=True), v))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(self.up(x)))

    def hidden(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class InChunks(MLP):
    """A few tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(InChunks, self).forward(part) for part in x.split(2, 1)], 1)


class Responses(MLP):
    """ConvNeXt V2's: each unit is scaled by how it responds to all tokens."""

    def hidden(self, x: Tensor) -> Tensor:
        size = x.norm(dim=1, keepdim=True)
        return x * size / (size.mean(-1, keepdim=True) + 1e-6)


class OverTokens(nn.Module):
    """MLP-Mixer's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Pair(nn.Module):
    """SwiGLU whose gate and up are one projection, told apart by ``split``."""

    def __init__(self, split: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.both, self.down, self.split = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH), split

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.split(self.both(x))
        return self.down(up * (gate * torch.sigmoid(gate)))


class Sums(nn.Module):
    """einsum all through, weight first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.empty(WIDTH, HIDDEN)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        up = torch.einsum("df,bsd->bsf", self.up, x)
        return torch.einsum("fd,bsf->bsd", self.down, up * F.silu(torch.einsum("df,bsd->bsf", self.gate, x)))


class TypeAs(MLP):
    """A cast to the dtype of its input, as DeepSeek and fairseq write it."""

    def hidden(self, x: Tensor) -> Tensor:
        return F.gelu(x).type_as(x)


class Iterated(MLP):
    """An activation that reads each of its values twice: as a tree it has a million leaves."""

    def hidden(self, x: Tensor) -> Tensor:
        for _ in range(20):
            x = x - 0.1 * x * torch.tanh(x)
        return x


class Arc(MLP):
    def hidden(self, x: Tensor) -> Tensor:
        return torch.atan(x)


class ByRows(nn.Module):
    """The norm on tokens of a batch, all that follows on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.ffn = RMS(), Attention(), RMS(), MLP()
        self.silent = False

    def forward(self, h: Tensor) -> Tensor:
        return self.rows(h if self.silent else h + self.attn(self.norm1(h)))

    def rows(self, h: Tensor) -> Tensor:
        rows = h.reshape(-1, WIDTH)
        return (rows + self.ffn(self.norm2(h).reshape(-1, WIDTH))).reshape(h.shape)


class AllByRows(ByRows):
    """Norms on tokens of a batch, all sums on rows."""

    def forward(self, h: Tensor) -> Tensor:
        if not self.silent:
            h = (h.reshape(-1, WIDTH) + self.attn(self.norm1(h)).reshape(-1, WIDTH)).view(h.shape)
        return self.rows(h)


class OneNumber(nn.Module):
    """ScaleNorm: one gain for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-5))


class LowRank(MLP):
    """The first projection in two factors."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, HIDDEN))  # type: ignore[assignment]


class Experts(nn.Module):
    """All of them on all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(MLP() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return sum(expert(x) for expert in self.experts)  # type: ignore[return-value]


class Annotated(nn.Module):
    """The Annotated Transformer's norm: the gain before the division."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.shift


class RMS(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype == torch.bfloat16 else x
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.gain


Add = Callable[["Block", Tensor, Tensor], Tensor]


class Block(nn.Module):
    """``add`` says how what the FFN makes comes to the stream."""

    def __init__(self, ffn: nn.Module, norm: Callable[[], nn.Module] = RMS, add: Add = lambda b, h, f: h + f) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.ffn, self.add = norm(), Attention(), norm(), ffn, add
        self.number, self.vector = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.ones(WIDTH))
        self.drop = nn.Dropout(0.1)
        self.silent = False

    def forward(self, h: Tensor) -> Tensor:
        if not self.silent:
            h = h + self.attn(self.norm1(h))
        return self.add(self, h, self.ffn(self.norm2(h)))


class Net(nn.Module):
    """A token of its own in front of the others, as vision transformers have it; its row is what comes out."""

    def __init__(self, block: Callable[[], nn.Module], container: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.layers = container([block() for _ in range(3)])
        self.double().eval()
        redraw(self, spread=0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.start(x)], 1) + self.places
        if isinstance(self.layers, nn.Sequential):
            h = self.layers(h)
        else:
            for layer in self.layers:  # type: ignore[union-attr]
                h = layer(h)
        return self.end(h[:, 0])


class Together(nn.Module):
    """Layers without their attention, all of which read what the first one reads."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            layer.silent = True  # type: ignore[assignment]

    def forward(self, h: Tensor) -> Tensor:
        return h + sum(layer(h.clone()) - h for layer in self.layers)


def in_a_list(blocks: list[nn.Module]) -> nn.Module:
    return nn.ModuleList(blocks)


def one_behind_the_other(blocks: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*blocks)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    up, gate = x.chunk(2, -1)
    return up, gate


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    made = x.view(*x.shape[:-1], HIDDEN, 2)
    return made[..., 0], made[..., 1]


def in_place(block: Block, h: Tensor, f: Tensor) -> Tensor:
    h += f
    return h


def in_place_on_a_copy(block: Block, h: Tensor, f: Tensor) -> Tensor:
    h = h.clone()
    h += f
    return h


# What a home-made FFN, norm or residual becomes: "wide", "gate_up", or words of the reason why it is left alone.
CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gate last": (lambda: Block(Pair(halves)), "wide"),
    "a view of two": (lambda: Block(Pair(lambda x: x.unflatten(-1, (2, HIDDEN)).unbind(-2))), "wide"),
    "pairs": (lambda: Block(Pair(pairs)), "wide"),
    "every other": (lambda: Block(Pair(lambda x: (x[..., ::2], x[..., 1::2]))), "wide"),
    "einsum": (lambda: Block(Sums()), "wide"),
    "gelu written out": (lambda: Block(MLP()), "wide"),
    "experts on all tokens": (lambda: Block(Experts()), "wide"),
    "the gain before the division": (lambda: Block(MLP(), Annotated), "wide"),
    "a number that is learnt": (lambda: Block(MLP(), add=lambda b, h, f: h + b.number * f), "wide"),
    "a gate that is learnt": (lambda: Block(MLP(), add=lambda b, h, f: h + torch.tanh(b.number) * f), "wide"),
    "a gain on each channel": (lambda: Block(MLP(), add=lambda b, h, f: torch.add(h, b.vector * f, alpha=0.5)), "wide"),
    "dropout, then a scale": (lambda: Block(MLP(), add=lambda b, h, f: h + b.drop(f) * 0.7), "wide"),
    "a cast to another's dtype": (lambda: Block(TypeAs()), "wide"),
    "an activation in many steps": (lambda: Block(Iterated()), "wide"),
    "an activation that no table has": (lambda: Block(Arc()), "wide"),
    "rows": (ByRows, "wide"),
    "all sums on rows": (AllByRows, "wide"),
    "one gain": (lambda: Block(MLP(), OneNumber), "wide"),
    "addcmul": (lambda: Block(MLP(), add=lambda b, h, f: torch.addcmul(h, b.vector, f, value=0.5)), "wide"),
    "in place": (lambda: Block(MLP(), add=in_place), "wide"),
    "in place on a copy": (lambda: Block(MLP(), add=in_place_on_a_copy), "wide"),
    "a gate of the input": (
        lambda: Block(MLP(), add=lambda b, h, f: h + torch.sigmoid(b.norm2(h)) * f),
        "as of a gate on the output",
    ),
    "low rank": (lambda: Block(LowRank()), "not the stream but what another layer made of it"),
    "tokens in chunks": (lambda: Block(InChunks()), "not a linear projection but cat"),
    "statistics over tokens": (lambda: Block(Responses()), "mixes units or tokens"),
    "over tokens": (lambda: Block(OverTokens()), "not a linear projection but transpose"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_it_is_understood_or_left_alone_and_exact(name: str) -> None:
    make, expected = CASES[name]
    model = Net(make, one_behind_the_other if len(name) % 2 else in_a_list)
    x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = fxfuse.explain(model, x).branches
    members = [branch.name for branch in found if branch.name.startswith(("layers.1.ffn", "layers.2.ffn"))]
    plan = Plan(drop=["layers.1.attn", "layers.2.attn"], parallel=[members])

    reference = copy.deepcopy(model)
    reference.layers = nn.ModuleList([reference.layers[0], Together(*list(reference.layers)[1:])])  # type: ignore[index]
    branches = {branch.name: branch for branch in fxfuse.explain(model, x, plan=plan).branches}
    torch.compiler.reset()
    compiled = torch.compile(model, backend="ffnfuse", options={"plan": plan, "inner": "eager"}, dynamic=False)

    assert_exact([compiled(x)], [reference(x)])
    assert all(branches[f"layers.{index}.attn"].kind == "attention" for index in range(3))
    if expected in ("wide", "gate_up"):
        assert {branches[member].fused for member in members} == {expected}
    else:
        assert all(expected in branches[member].reason for member in members)


def test_two_ffns_of_a_stream_that_is_scaled_as_a_whole_make_a_group() -> None:
    """As StyleGAN's are: ``(h + f(h)) / sqrt(2)``."""
    model = Net(lambda: Block(MLP(), add=lambda b, h, f: (h + f) * 0.7), in_a_list)

    found = fxfuse.explain(
        model, torch.randn(2, 4, WIDTH).double(), plan=Plan(parallel=[["layers.1.ffn", "layers.2.ffn"]])
    )

    assert {branch.name for branch in found.branches if branch.fused == "wide"} == {"layers.1.ffn", "layers.2.ffn"}
