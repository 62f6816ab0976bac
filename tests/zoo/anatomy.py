"""What a model consists of, told from its tree of modules by rules on their names. Never imports fxfuse.

The rules see class names and which modules a call runs; the library sees adds and matrix products. Where the two agree
on a number, neither copied it from the other.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

Part: TypeAlias = Literal["attention", "mixer", "ffn", "moe", "shared"]
"""``shared`` is an FFN beside routed experts, inside of the module that holds both."""

_ATTENTION = re.compile(r"Attention|Attn|MLA$")
_MIXER = re.compile("Mixer|Mamba|Delta|Recurrent|ShortConv|LSTM|SSM|Lightning|LinearAttention|LinearAttn|KDA")
_MIXERS_ATTENTION = re.compile("Rwkv.*Att")  # which is none
_FFN = re.compile("M(LP|lp)(?!Norm)|FeedForward|FFN|FFW|Ffn|ffn|Intermediate|Moe|MoE|MOE|SwiGLU|FF$|DenseActDense")
_ROUTED = re.compile(r"(?<!Shared)Expert|Router|Top[kK]|Sparse|Mo[eE](Block|Layer)?$|MOE$")
_NO_BLOCK = re.compile(r"Norm|Embedding|Rotary|Mask|Activation|Cache|Dropout")


@dataclass(frozen=True)
class Site:
    """A part of a block: where it is, what it is, the linear map in it that runs last, how often a call runs it, and
    whether it has more maps than that one, so that the last is its end.
    """

    path: str
    part: Part
    last: nn.Module
    calls: int
    whole: bool = True


@dataclass(frozen=True)
class Block:
    """One element of a list of layers, and its parts in the order in which they run."""

    path: str
    module: nn.Module
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Anatomy:
    """The lists of layers that a call runs, longest first, and how often it runs parts of each sort."""

    stacks: tuple[tuple[Block, ...], ...]
    calls: Mapping[Part, int]


def dissect(model: nn.Module, inputs: Mapping[str, Tensor]) -> Anatomy:
    """Call the model once and tell its parts."""
    calls = _calls(model, inputs)
    stacks: list[tuple[Block, ...]] = []
    counts: dict[Part, int] = {"attention": 0, "mixer": 0, "ffn": 0, "moe": 0, "shared": 0}
    for path, held in _outermost_lists(model):
        blocks = [
            Block(f"{path}.{name}", child, tuple(_sites(f"{path}.{name}", child, calls)))
            for name, child in held.named_children()
            if child in calls
        ]
        if not any(block.sites for block in blocks):
            continue
        stacks.append(tuple(blocks))
        for block in blocks:
            for site in block.sites:
                counts[site.part] += site.calls
    stacks.sort(key=len, reverse=True)
    return Anatomy(tuple(stacks), counts)


def _calls(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[nn.Module, list[int]]:
    """The modules that run, and the times when they return."""
    found: dict[nn.Module, list[int]] = {}
    clock = iter(range(10**9))
    handles = [
        module.register_forward_hook(lambda module, args, out: found.setdefault(module, []).append(next(clock)))
        for module in model.modules()
    ]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _outermost_lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Lists of two and more modules that are in no other such list."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList | nn.Sequential | nn.ModuleDict) and len(child) > 1:
            yield inner, child
        else:
            yield from _outermost_lists(child, inner)


def _sites(path: str, block: nn.Module, calls: Mapping[nn.Module, list[int]]) -> list[Site]:
    found = list(_named(path, block, calls))
    # What no module of its own holds: the block's own linear maps, and where no FFN has a name those of a Sequential.
    named = any(site.part in ("ffn", "moe") for site in found)
    taken = {inner for site in found for inner in _at(block, path, site.path).modules()}
    loose = [inner for inner in block.modules() if inner not in taken and _is_map(inner) and inner in calls]
    if named:
        loose = [inner for inner in loose if isinstance(inner, nn.Linear)]
    own = [inner for inner in loose if inner in set(block.children()) or (not named and _in_sequential(block, inner))]
    if len(own) >= 2:
        last = max(own, key=lambda inner: calls[inner][-1])
        found.append(Site(path, "ffn", last, len(calls[last])))
    return sorted(found, key=lambda site: calls[site.last][0])


def _named(path: str, module: nn.Module, calls: Mapping[nn.Module, list[int]]) -> Iterator[Site]:
    """The outermost parts at and below ``module`` that their class names give away."""
    maps = [inner for inner in module.modules() if _is_map(inner) and inner in calls]
    part = _part(module) if maps else None
    if part is not None:
        last = max(maps, key=lambda inner: calls[inner][-1])
        yield Site(path, part, last, len(calls.get(module, calls[last])), len(maps) > 1)
        if part == "moe":
            yield from _shared(path, module, calls)
        return
    if _role(type(module)).endswith("Norm") and not any(_ATTENTION.search(_role(type(m))) for m in module.modules()):
        return  # the matrices of a norm that gates its output are no FFN
    for name, child in module.named_children():
        yield from _named(f"{path}.{name}", child, calls)


def _shared(path: str, module: nn.Module, calls: Mapping[nn.Module, list[int]]) -> Iterator[Site]:
    """The FFNs in a mixture of experts that are no experts: they run once a call, on all tokens."""
    for name, child in module.named_children():
        maps = [inner for inner in child.modules() if _is_map(inner) and inner in calls]
        if len(maps) > 1 and child in calls and _part(child) == "ffn":
            last = max(maps, key=lambda inner: calls[inner][-1])
            yield Site(f"{path}.{name}", "shared", last, len(calls[child]))
        elif not _ROUTED.search(_role(type(child))) and not isinstance(child, nn.ModuleList):
            yield from _shared(f"{path}.{name}", child, calls)


@cache
def _role(kind: type[nn.Module]) -> str:
    """The name of a class without that of its family: of ``RecurrentGemmaMlp``, where there is a
    ``RecurrentGemmaPreTrainedModel`` beside it, ``Mlp``.
    """
    ending = "PreTrainedModel"
    beside = [name for name in vars(sys.modules[kind.__module__]) if name.endswith(ending)]
    families = [family for family in (name.removesuffix(ending) for name in beside) if kind.__name__.startswith(family)]
    return kind.__name__.removeprefix(max(families, key=len, default="")) or kind.__name__


def _part(module: nn.Module) -> Part | None:
    name = _role(type(module))
    if _NO_BLOCK.search(name) or re.search(r"Decoder(Layer)?$", name):
        return None
    if _MIXER.search(name) or _MIXERS_ATTENTION.search(type(module).__name__):
        return "mixer"
    if _ATTENTION.search(name) and not re.search(r"Layer$|Block$", name):
        return "attention"
    if _FFN.search(name) and (not name.endswith("Layer") or _ROUTED.search(name)):
        routed = any(_ROUTED.search(_role(type(inner))) for inner in module.modules())
        return "moe" if routed else "ffn"
    return None


def _is_map(module: nn.Module) -> bool:
    """Whether a module is a linear map of its own: one matrix, no children."""
    weights = [weight for weight in module.parameters(recurse=False) if weight.dim() >= 2]
    return bool(weights) and not isinstance(module, nn.Embedding)


def _in_sequential(block: nn.Module, inner: nn.Module) -> bool:
    return any(isinstance(module, nn.Sequential) and inner in set(module.children()) for module in block.modules())


def _at(block: nn.Module, path: str, inner: str) -> nn.Module:
    return block.get_submodule(inner.removeprefix(path).removeprefix("."))
