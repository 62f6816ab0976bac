"""Decoders whose matrices are spread over processes: by DTensors, or by hand with collectives of their own.

A reference is the same decoder in one process, under a plan by its own modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

D, HEADS, TOKENS = 16, 4, 50

How: TypeAlias = Literal["dtensor", "whole outputs", "sequence", "functional", "in place"]


@contextmanager
def one_process() -> Iterator[None]:
    """The smallest group of processes: all is sharded, and one process has all of it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Sum(nn.Module):
    """Adds up the values of all processes, if told how."""

    how: str = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "functional":
            return functional.all_reduce(x, "sum", dist.group.WORLD)
        if self.how == "in place":
            dist.all_reduce(x)
        return x


class Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=bias) for _ in range(4))
        self.sum = Sum()

    def forward(self, x: Tensor) -> Tensor:
        heads = [part(x).unflatten(-1, (-1, D // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.sum(self.o(mixed.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    def __init__(self, f: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, f, bias=False), nn.Linear(D, f, bias=False)
        self.down, self.sum = nn.Linear(f, D, bias=False), Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.down(F.silu(self.gate(x)) * self.up(x)))


class MLP(nn.Module):
    def __init__(self, f: int) -> None:
        super().__init__()
        self.up, self.down, self.sum = nn.Linear(D, f), nn.Linear(f, D), Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.down(F.gelu(self.up(x))))


class Block(nn.Module):
    """An attention and an FFN, one after the other, or ``beside`` each other, both reading one point."""

    def __init__(self, f: int, beside: bool) -> None:
        super().__init__()
        norm = nn.LayerNorm if beside else nn.RMSNorm
        self.attn_norm, self.mlp_norm = norm(D, eps=1e-5), norm(D, eps=1e-5)
        self.attn, self.mlp, self.beside = Attention(beside), MLP(f) if beside else SwiGLU(f), beside

    def forward(self, h: Tensor) -> Tensor:
        if self.beside:
            return h + self.attn(self.attn_norm(h)) + self.mlp(self.mlp_norm(h))
        h = h + self.attn(self.attn_norm(h))
        return h + self.mlp(self.mlp_norm(h))


class Decoder(nn.Module):
    """Blocks of SwiGLUs without biases; or, ``beside``, of attentions and MLPs with biases that read one point."""

    def __init__(self, depth: int = 4, f: int = 24, beside: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, D)
        self.layers = nn.ModuleList(Block(f, beside) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(D, eps=1e-5), nn.Linear(D, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))

    def planned(self, tokens: Tensor, drop: Collection[str], parallel: Sequence[Sequence[str]]) -> Tensor:
        """The same under a plan of single branches."""
        h, points = self.embedding(tokens), dict[str, Tensor]()
        group_of = {name: group for group in parallel for name in group}
        names = [f"layers.{index}.{kind}" for index in range(len(self.layers)) for kind in ("attn", "mlp")]
        for name in names:
            layer = self.layers[int(name.split(".")[1])]
            if layer.beside and name.endswith("mlp"):
                points[name] = points[name.replace("mlp", "attn")]
            else:
                points[name] = h
            for member in group_of.get(name, [name] if name not in drop else []):
                if name in group_of and name != min(group_of[name], key=names.index):
                    continue
                own = self.get_submodule(member.rpartition(".")[0])
                kind = member.rpartition(".")[2]
                h = h + own.get_submodule(kind)(own.get_submodule(f"{kind}_norm")(points[name]))
        return self.head(self.norm(h))


def decoder(depth: int = 4, f: int = 24, beside: bool = False, seed: int = 0) -> Decoder:
    """In float64 and eval mode, the same in every process, with gains and biases of which to lose one shows."""
    made = Decoder(depth, f, beside).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            vector = 0.3 * noise + (0 if name.endswith("bias") else 1)
            weight.copy_(vector if weight.dim() == 1 else noise / weight.shape[-1] ** 0.5)
    return made


def tokens(length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(0, TOKENS, (2, length), generator=torch.Generator().manual_seed(seed))


def shard(model: Decoder, how: How) -> Decoder:
    """Spread the matrices of ``model`` over all processes, in place."""
    return _by_dtensors(model, how) if how in ("dtensor", "whole outputs", "sequence") else _by_hand(model, how)


def _by_dtensors(model: Decoder, how: How) -> Decoder:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sequence = how == "sequence"
    for layer in model.layers:
        local = how != "whole outputs"
        into, out = [("attn.q", True), ("attn.k", True), ("attn.v", True)], ["attn.o", "mlp.down"]
        into += [(name, local) for name in ("mlp.gate", "mlp.up") if hasattr(layer.mlp, name[4:])]
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel(use_local_output=own) for name, own in into}
        plan |= {name: RowwiseParallel(output_layouts=Shard(1) if sequence else Replicate()) for name in out}
        if sequence:
            spread = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
            plan |= {"attn": spread, "mlp": spread, "attn_norm": SequenceParallel(), "mlp_norm": SequenceParallel()}
        parallelize_module(layer, mesh, plan)
    if sequence:
        whole: dict[str, ParallelStyle] = {
            "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        parallelize_module(model, mesh, whole)
    return model


def _by_hand(model: Decoder, how: How) -> Decoder:
    rank, world = dist.get_rank(), dist.get_world_size()
    for layer in model.layers:
        for name in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "attn.o", "mlp.down"):
            linear = layer.get_submodule(name)
            own = linear.weight.detach().chunk(world, 1 if name in ("attn.o", "mlp.down") else 0)[rank]
            linear.weight = nn.Parameter(own.clone())
        layer.attn.sum.how = layer.mlp.sum.how = how
    return model
