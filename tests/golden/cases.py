"""The passes, each with a model in which one sees what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fxfuse.cpu import prepack as prepacking
from fxfuse.passes import PassReport, drop, fuse_ffn, linear, merge_gate_up, narrow, parallelize, simplify
from fxfuse.passes.add_in_kernel import AddInKernel
from fxfuse.passes.normalise.sizes import fill_in
from fxfuse.passes.runner import run
from tests.golden.page import Names, lines, page
from tests.models.blocks import WIDTH, Attention, Stream, SwiGLU, Traced, ready, trace, vectors

FIRST = ["layers.0.body"]
BOTH = ["layers.0.body", "layers.1.body"]
FIVE = [0, 1, 2, 7, 15]


@dataclass(frozen=True)
class Case:
    """A page: a model's graph, made ready for a pass, and the pass.

    Attributes:
        name: of the page.
        about: in one sentence, what one sees on it.
        model: whose graph it is.
        run: the pass.
        ready: what goes over the graph before.
        traced_by: "dynamo" or "symbolic_trace".
        dtype: of the model.
        computes: what the graph computes afterwards, told by the model's own modules.
    """

    name: str
    about: str
    model: Callable[[], nn.Module]
    run: Callable[[Traced], PassReport | None]
    ready: Callable[[Traced], object] = lambda traced: None
    traced_by: str = "dynamo"
    dtype: torch.dtype = torch.float64
    computes: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)

    def trace(self) -> tuple[nn.Module, Traced]:
        """The model, and its graph as the pass gets it."""
        model = ready(self.model()).to(self.dtype)
        x = vectors().to(self.dtype)
        if self.traced_by == "symbolic_trace":
            return model, Traced(torch.fx.symbolic_trace(model), (x,))
        traced = trace(model, x)
        self.ready(traced)
        return model, traced

    def page(self) -> str:
        """The text of the page."""
        _, traced = self.trace()
        names = Names(traced.names)
        before = lines(traced, names)
        report = self.run(traced)
        after = lines(traced, names)
        return f"{self.name}: {self.about}\n" + page(before, after, names, report)


class Disguised(nn.Module):
    """An FFN's contribution behind things that compute nothing: a cast to its own dtype, idle dropout, a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12, bias=False), nn.Linear(12, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        f = self.down(F.gelu(self.up(x).clone()).to(x.dtype))
        return x + F.dropout(f, p=0.1, training=self.training)


class Spelled(nn.Module):
    """One residual add by ``addcmul``, and one by a sum over a stack; a linear map by ``einsum``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.gain = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addcmul(x, self.gain, torch.einsum("bsd,fd->bsf", x, self.weight))
        return torch.stack([h, F.glu(torch.cat([h, h], -1))]).sum(0)


class InPlace(nn.Module):
    """``h += f``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        h += self.linear(h)
        return h


class Checkpointed(nn.Module):
    """A layer under an activation checkpoint: the stream goes into another graph and comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda h: h + self.linear(h), x, use_reentrant=False)


class Named(nn.Sequential):
    """Modules in a row, which have names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.act = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU()


def attention_and_ffn() -> Stream:
    return Stream(Attention(), SwiGLU())


def two_ffns() -> Stream:
    return Stream(SwiGLU(16), SwiGLU(16))


def skipping_the_first(model: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(model, Stream)
    return model.layers[1](model.start(x))


def with_the_first_linear(model: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(model, Stream)
    h, (first, second) = model.start(x), model.layers
    return second(h + first.body.o(first.norm(h)))


def of_five_units(model: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(model, Stream)
    h, (first, second) = model.start(x), model.layers
    normed, body = first.norm(h), first.body
    hidden = (F.silu(body.gate(normed)) * body.up(normed))[..., FIVE]
    return second(h + F.linear(hidden, body.down.weight[:, FIVE]))


def in_parallel(model: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(model, Stream)
    h = model.start(x)
    return h + sum(model.branch(index, h) for index in range(len(model.layers)))


def side_by_side(traced: Traced) -> None:
    parallelize(traced.gm, [BOTH])


def _kernel(traced: Traced) -> PassReport:
    return fuse_ffn(traced.gm, kernels="fxfuse")


def _ready_to_add(traced: Traced) -> None:
    side_by_side(traced)
    _kernel(traced)
    fill_in(traced.gm)


def _add_in_kernel(traced: Traced) -> PassReport:
    return run(traced.gm, AddInKernel())


def _prepack(traced: Traced) -> PassReport:
    """As if oneDNN were faster for every size: whether it is depends on the machine."""
    with patch.object(prepacking, "prepacked_wins", lambda size: True), patch.object(prepacking, "LEAST", 0):
        return prepacking.prepack(traced.gm)


def _simplify(traced: Traced) -> PassReport:
    return simplify(traced.gm, traced.inputs)


CASES = [
    Case("simplify", "what computes nothing is gone: a copy, a cast to the dtype at hand, idle dropout.",
         Disguised, _simplify),
    Case("inline", "simplify writes modules of torch.nn, as symbolic_trace leaves them, as functions of their weights.",
         Named, _simplify, traced_by="symbolic_trace"),
    Case("translate", "simplify says in the recogniser's words what authors say in their own.", Spelled, _simplify),
    Case("functional", "simplify turns a sum in place, in memory that is the graph's own, into a new value.",
         InPlace, _simplify),
    Case("checkpoints", "simplify writes the body of an activation checkpoint into the graph that calls it.",
         Checkpointed, _simplify),
    Case("drop", "an attention leaves, and with it its norm and its projections; the stream goes past it.",
         attention_and_ffn, lambda traced: drop(traced.gm, FIRST), computes=skipping_the_first),
    Case("linear", "an attention becomes its output projection, which reads the norm; queries, keys and scores leave.",
         attention_and_ffn, lambda traced: linear(traced.gm, FIRST), computes=with_the_first_linear),
    Case("narrow", "the first FFN keeps five of its hidden units: rows and columns of its weights, as expressions.",
         two_ffns, lambda traced: narrow(traced.gm, {FIRST[0]: tuple(FIVE)}), computes=of_five_units),
    Case("parallelize", "the second FFN reads the stream where the first does, and both are added there.",
         two_ffns, lambda traced: parallelize(traced.gm, [BOTH]), computes=in_parallel),
    Case("fuse_ffn", "two FFNs that read one point become one of twice the width; the gains of their norms go into it.",
         two_ffns, lambda traced: fuse_ffn(traced.gm), side_by_side, computes=in_parallel),
    Case("fuse_ffn_share", "with weights='share': a batch of GEMMs over the weights as they are, the gains outside.",
         two_ffns, lambda traced: fuse_ffn(traced.gm, weights="share"), side_by_side, computes=in_parallel),
    Case("fuse_ffn_kernel", "with kernels='fxfuse': the wide FFN is one call, norm and activation included.",
         two_ffns, _kernel, side_by_side, computes=in_parallel),
    Case("add_in_kernel", "the call of the kernel adds its result to the stream itself.",
         two_ffns, _add_in_kernel, _ready_to_add, computes=in_parallel),
    Case("merge_gate_up", "gate and up become one GEMM, whose halves the FFN goes on with.",
         lambda: Stream(SwiGLU()), lambda traced: merge_gate_up(traced.gm)),
    Case("prepack", "q, k and v read one value: one map over weights in oneDNN's layout; the output has its own.",
         lambda: Stream(Attention()), _prepack, dtype=torch.float32),
]  # fmt: skip
