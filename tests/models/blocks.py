"""The parts of transformers, small and written by hand, and the graphs of what is built from them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fxfuse.backend.frontend import capture
from fxfuse.errors import PlanError
from fxfuse.graph.ops import is_impure
from fxfuse.graph.surgery import copy_graph
from fxfuse.stream.branch import Branch
from fxfuse.stream.finder import ResidualStream, find_streams
from tests.models.bodies import SwiGLU, TransposedLinear

WIDTH = 8
HIDDEN = 12

on_every_road = pytest.mark.parametrize("road", ["dynamo", "export", "strict export"])
on_both_roads = pytest.mark.parametrize("road", ["dynamo", "export"])


@dataclass
class Traced:
    """A graph, what to call it with, and the names of its weights as far as the graph does not know them."""

    gm: fx.GraphModule
    inputs: tuple[object, ...]
    names: dict[fx.Node, str] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, ...]:
        """The outputs of the graph as it stands; what it writes in place, it writes to the inputs kept here."""
        return flat_tensors(self.gm(*self.inputs))

    @property
    def streams(self) -> tuple[ResidualStream, ...]:
        return find_streams(self.gm, self.names)

    @property
    def stream(self) -> ResidualStream:
        (stream,) = self.streams
        return stream

    def __getitem__(self, name: str) -> Branch:
        """The branch of that name, of whichever stream."""
        (found,) = [branch for stream in self.streams for branch in stream.branches if branch.name == name]
        return found

    def copy(self) -> Traced:
        """The same graph on the same weights, to be rewritten by another test."""
        gm = fx.GraphModule(self.gm, copy_graph(self.gm.graph))
        by_name = {node.name: node for node in gm.graph.nodes}
        inputs = tuple(
            v if isinstance(v, nn.Parameter) or not isinstance(v, Tensor) else v.clone() for v in self.inputs
        )
        return Traced(gm, inputs, {by_name[node.name]: name for node, name in self.names.items()})

    def count(self, *words: str) -> int:
        """How many nodes call something with one of ``words`` in its name."""
        called = [node for node in self.gm.graph.nodes if node.op in ("call_function", "call_method")]
        names = [str(getattr(node.target, "__name__", node.target)) for node in called]
        return sum(any(word in name for word in words) for name in names)

    @property
    def linears(self) -> int:
        return self.count("linear")


def trace(model: nn.Module, *args: Tensor, road: str = "dynamo") -> Traced:
    """The one graph of ``model``; the arguments are copied, since a model may write to them."""
    own = tuple(arg.clone() for arg in args)
    with torch.no_grad():
        if road == "dynamo":
            (captured,) = capture(model, *own)
            return Traced(captured.gm, refilled(captured.inputs, own, args), captured.names)
        gm = torch.export.export(model, own, strict=road == "strict export").module()
    assert isinstance(gm, fx.GraphModule)
    return Traced(gm, tuple(arg.clone() for arg in args))


def refilled(inputs: tuple[object, ...], used: tuple[Tensor, ...], args: tuple[Tensor, ...]) -> tuple[object, ...]:
    """Dynamo's inputs with fresh copies of the arguments, which the capturing call may have overwritten."""
    fresh = {id(one): arg.clone() for one, arg in zip(used, args, strict=True)}
    return tuple(fresh.get(id(value), value) for value in inputs)


def flat_tensors(outputs: object) -> tuple[Tensor, ...]:
    return tuple(tree_leaves(outputs))


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode and float64, with gains and biases far enough from 1 and 0 that losing one shows."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise)
    return model


def vectors(*sizes: int, seed: int = 1) -> Tensor:
    """Random hidden states, ``[2, 3, WIDTH]`` if nothing else is asked for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(sizes or (2, 3, WIDTH)), generator=generator, dtype=torch.float64)


def assert_same(got: tuple[Tensor, ...], expected: object) -> None:
    """Equal in float64 to 1e-10, output by output."""
    wanted = flat_tensors(expected)
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-10, atol=1e-10)


class PackedSwiGLU(nn.Module):
    def __init__(self, hidden: int = HIDDEN, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(WIDTH, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MLP(nn.Module):
    def __init__(self, hidden: int = HIDDEN, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GLU(nn.Module):
    """One packed projection and F.glu, or the module of that name."""

    def __init__(self, glu: Callable[[Tensor], Tensor] = F.glu) -> None:
        super().__init__()
        self.up, self.down, self.glu = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH), glu

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.glu(self.up(x)))


class GPT2MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = TransposedLinear(WIDTH, HIDDEN), TransposedLinear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(F.gelu(self.up(x), approximate="tanh")), 0.1, self.training)


class Attention(nn.Module):
    """Causal self-attention of two heads; ``key_value`` lets a layer read another's."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    @staticmethod
    def heads(x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.k(x)), self.heads(self.v(x))

    def attend(self, x: Tensor, key: Tensor, value: Tensor, causal: bool = True) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.heads(self.q(x)), key, value, is_causal=causal)
        return self.o(mixed.transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, *self.key_value(x))


class Layer(nn.Module):
    """``h + body(norm(h))``, the sum written by ``add``."""

    def __init__(
        self,
        body: nn.Module,
        norm: nn.Module | None = None,
        add: Callable[[Tensor, Tensor], Tensor] = operator.add,
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5) if norm is None else norm
        self.body = body
        self.add = add

    def branch(self, h: Tensor) -> Tensor:
        """What the layer adds to a stream of value ``h``, up to what ``add`` does to it."""
        return self.body(self.norm(h))

    def forward(self, h: Tensor) -> Tensor:
        return self.add(h, self.branch(h))


class Stream(nn.Module):
    """Layers in a row, on a stream of the graph's own: its branches are ``layers.0.body``, ``layers.1.body``, ..."""

    def __init__(self, *bodies: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(body if isinstance(body, Layer) else Layer(body) for body in bodies)

    def start(self, x: Tensor) -> Tensor:
        return x * 1.5

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        for layer in self.layers:
            h = layer(h)
        return h

    def branch(self, index: int, h: Tensor) -> Tensor:
        return self.layers[index].branch(h)


class Block(nn.Module):
    """The parts of a decoder layer; who uses it says how they are put together."""

    def __init__(self, attn: nn.Module | None = None, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.attn = attn or Attention()
        self.mlp_norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.mlp = mlp or SwiGLU()

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attn(self.attn_norm(h))
        return h + self.mlp(self.mlp_norm(h))


class Decoder(nn.Module):
    """Blocks, each an attention and then an FFN, a norm and a head; subclasses wire them in their own way."""

    depth = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(self.depth))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.head = nn.Linear(WIDTH, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))

    def attn(self, index: int, h: Tensor) -> Tensor:
        layer = self.layers[index]
        return layer.attn(layer.attn_norm(h))

    def mlp(self, index: int, h: Tensor) -> Tensor:
        layer = self.layers[index]
        return layer.mlp(layer.mlp_norm(h))


def levels(stream: ResidualStream) -> dict[str, int]:
    """Each branch and the number of sums before the point that it reads."""
    return {branch.name: stream.levels[branch.read] for branch in stream.branches}


def assert_refused(traced: Traced, edit: Callable[[fx.GraphModule], object], words: str) -> None:
    """``edit`` is an error that says ``words``, and leaves the graph, its module and its outputs as they were."""
    before, code, expected = traced.gm.graph.python_code("self").src, traced.gm.code, traced()
    with pytest.raises(PlanError, match=words):
        edit(traced.gm)
    assert traced.gm.graph.python_code("self").src == before
    assert traced.gm.code == code
    traced.gm.graph.lint()
    assert_same(traced(), expected)


def assert_no_dead_nodes(gm: fx.GraphModule) -> None:
    """Every node that only computes is read by somebody, but for constants that torch.export leaves."""
    called = [n for n in gm.graph.nodes if n.op.startswith("call") and n.all_input_nodes]
    dead = [n for n in called if not n.users and not is_impure(n) and "_guards_fn" not in str(n.target)]
    assert dead == []
