"""How a plan edits the modules of a model of transformers: told by data, and done when the model is built.

Written by fxfuse. The model is built by its own class, and then loses and gains modules: dropped branches leave, those
that read one point of the stream are computed side by side, FFNs among them as one wide FFN. There is a layer for each
attention, numbered anew, so that caches have no gaps; FFNs whose attention has left are computed in the layer before.

The data (``config.planned``) is what the planned model consists of::

    layers: path of the list of layers, in the base model
    original: attributes of the config by which the class builds the original
    blocks: a list of
        layer: number of the original's layer that it is made of; None for one that does nothing
        cache: number of its attention, if the layer is as it was
        slots: a list of
            path: of a branch in the layer
            idle: paths of modules in the layer that hand on what they are given, as their work is done in the tree
            takes, returns: where the branch is given the stream, and the length of the tuple that it returns, or None
            scale: what the layer multiplies with what the slot returns
            tree: what is computed, or None for nothing

A tree is ``{"chain": trees, "scale": number}``, one after the other on a copy of the stream of their own; ``{"sum":
trees}``, side by side; or a branch: ``before``, ``core``, ``after`` (paths of modules in the base model), ``scale``,
``cache``, and how the core is called (``takes``, ``all``, ``picks``). Of a ``wide`` FFN the core is new, and of a
``linear`` map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Nothing(nn.Module):
    """A layer that hands on the stream. It stands where a layer computes two attentions: each has a layer's number."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class Trees(nn.Module):
    """Several trees. No name of theirs is a number: engines take a number in a path for that of its layer."""

    def __init__(self, trees: Sequence[nn.Module]) -> None:
        super().__init__()
        for place, tree in enumerate(trees):
            self.add_module(f"tree{place}", tree)


class Chain(Trees):
    """Trees one after the other, on a copy of the stream of their own; returns what they have added to it.

    ``scale`` is what the layer will multiply that with.
    """

    def __init__(self, trees: Sequence[nn.Module], scale: float = 1.0) -> None:
        super().__init__(trees)
        self.scale = scale

    def forward(self, stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        first, *others = self.children()
        total: Tensor = first(stream, args, kwargs)
        for tree in others:
            grown = total if self.scale == 1.0 else self.scale * total
            total = total + tree(stream + grown, args, kwargs)
        return total


class Sum(Trees):
    """Trees side by side: all read the same stream."""

    def forward(self, stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        first, *others = self.children()
        total: Tensor = first(stream, args, kwargs)
        for tree in others:
            total = total + tree(stream, args, kwargs)
        return total


class Branch(nn.Module):
    """One branch with the norms around it.

    Args:
        before, core, after: what computes it from the stream.
        takes: where the core is given its input: a position, or a keyword.
        all: hand on to the core what else the slot was given.
        picks: which entry of a tuple that the core returns is its contribution; None if it returns that alone.
        scale: what the contribution is multiplied with.
    """

    def __init__(
        self,
        before: Sequence[nn.Module],
        core: nn.Module,
        after: Sequence[nn.Module],
        takes: int | str = 0,
        all: bool = False,
        picks: int | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.before, self.core, self.after = nn.ModuleList(before), core, nn.ModuleList(after)
        self.takes, self.all, self.picks, self.scale = takes, all, picks, scale

    def forward(self, stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        for module in self.before:
            stream = module(stream)
        made: Any
        if not self.all:
            made = self.core(stream)
        elif isinstance(self.takes, str):
            made = self.core(*args, **{**kwargs, self.takes: stream})
        else:
            made = self.core(*args[: self.takes], stream, *args[self.takes + 1 :], **kwargs)
        made = made if self.picks is None else made[self.picks]
        for module in self.after:
            made = module(made)
        contribution: Tensor = made if self.scale == 1.0 else made * self.scale
        return contribution


class Slot(nn.Module):
    """Stands in the place of a branch of a layer, is called as that was, and returns what the tree contributes."""

    def __init__(self, original: nn.Module, tree: nn.Module | None, takes: int | str, returns: int | None) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if not name.startswith("_") and name != "forward" and not isinstance(value, Tensor | nn.Module):
                setattr(self, name, value)  # what the layer may ask for
        self.tree, self._takes, self._returns = tree, takes, returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = kwargs[self._takes] if isinstance(self._takes, str) else args[self._takes]
        made = torch.zeros_like(stream) if self.tree is None else self.tree(stream, args, kwargs)
        return made if self._returns is None else (made, *[None] * (self._returns - 1))


class BareNorm(nn.Module):
    """A norm whose gain and shift were folded into what reads it."""

    def __init__(self, kind: str, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        given = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32) if self.kind.endswith("32") else hidden_states
        if self.kind.startswith("layer"):
            return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps).to(given)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return (hidden_states * torch.rsqrt(variance + self.eps)).to(given)


class SquaredReLU(nn.Module):
    """The square of a ReLU."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.relu(hidden_states).square()


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "sigmoid": nn.Sigmoid,
}


class GatedFFN(nn.Module):
    """``down(activation(gate x) * (up x))``."""

    def __init__(self, width: int, hidden: int, activation: str, biases: Mapping[str, bool]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=biases["gate"])
        self.up_proj = nn.Linear(width, hidden, bias=biases["up"])
        self.down_proj = nn.Linear(hidden, width, bias=biases["down"])
        self.act_fn = ACTIVATIONS[activation]()

    def forward(self, hidden_states: Tensor) -> Tensor:
        made: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return made


class PlainFFN(nn.Module):
    """``down(activation(up x))``."""

    def __init__(self, width: int, hidden: int, activation: str, biases: Mapping[str, bool]) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden, bias=biases["gate"])
        self.down_proj = nn.Linear(hidden, width, bias=biases["down"])
        self.act_fn = ACTIVATIONS[activation]()

    def forward(self, hidden_states: Tensor) -> Tensor:
        made: Tensor = self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return made


def edit(base: nn.Module, planned: Mapping[str, Any]) -> None:
    """Edit the modules of ``base``, built by its own class, in place."""
    modules = dict(base.named_modules())  # as they are before any edit: names mean the original's modules
    layers = list(base.get_submodule(planned["layers"]).children())
    made = [_layer(block, layers, modules) for block in planned["blocks"]]
    path, _, name = planned["layers"].rpartition(".")
    setattr(base.get_submodule(path), name, nn.ModuleList(made))


def _layer(block: Mapping[str, Any], layers: list[nn.Module], modules: Mapping[str, nn.Module]) -> nn.Module:
    if block["layer"] is None:
        return Nothing()
    layer: nn.Module = layers[block["layer"]]
    if "slots" not in block:
        _number(layer, block["cache"])
        return layer
    slots = {slot["path"]: _slot(slot, layer, modules) for slot in block["slots"]}
    for slot in block["slots"]:
        for path in slot["idle"]:
            _put(layer, path, nn.Identity())
        _put(layer, slot["path"], slots[slot["path"]])
    return layer


def _slot(slot: Mapping[str, Any], layer: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    tree = None if slot["tree"] is None else _tree(slot["tree"], modules)
    return Slot(layer.get_submodule(slot["path"]), tree, slot["takes"], slot["returns"])


def _tree(tree: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> nn.Module:
    if "chain" in tree:
        return Chain([_tree(each, modules) for each in tree["chain"]], tree["scale"])
    if "sum" in tree:
        return Sum([_tree(each, modules) for each in tree["sum"]])
    call = {key: tree[key] for key in ("takes", "all", "picks", "scale") if key in tree}
    around = [[modules[path] for path in tree[where]] for where in ("before", "after")]
    if "wide" in tree:
        wide = tree["wide"]
        kind = GatedFFN if wide["gated"] else PlainFFN
        core: nn.Module = kind(wide["width"], wide["hidden"], wide["activation"], wide["biases"])
        core.key = wide["key"]
        norm = [] if wide["norm"] is None else [BareNorm(wide["norm"], wide["eps"])]
        return Branch(norm, core, around[1], **call)
    if "linear" in tree:
        core = nn.Linear(tree["linear"]["width"], tree["linear"]["width"], bias=tree["linear"]["bias"])
        core.key = tree["linear"]["key"]
        return Branch(around[0], core, around[1], **call)
    core = modules[tree["core"]]
    if tree.get("cache") is not None:
        _number(core, tree["cache"])
    return Branch(around[0], core, around[1], **call)


def _number(module: nn.Module, number: int) -> None:
    """Let the attention in ``module`` use layer ``number`` of the cache."""
    for part in module.modules():
        if isinstance(getattr(part, "layer_idx", None), int):
            setattr(part, "layer_idx", number)  # noqa: B010  # torch types the attributes of modules as tensors


def _put(module: nn.Module, path: str, part: nn.Module) -> None:
    above, _, name = path.rpartition(".")
    setattr(module.get_submodule(above), name, part)


@contextmanager
def as_original(config: Any) -> Iterator[None]:
    """Let ``config`` be the original's meanwhile, so that its class builds all layers."""
    own = {name: getattr(config, name) for name in config.planned["original"]}
    try:
        for name, value in config.planned["original"].items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(config, name, value)


class EditedModel(nn.Module):
    """Before the class of a base model: builds that, then edits it."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        with as_original(config):
            super().__init__(config, *args, **kwargs)
        edit(self, config.planned)


class EditedForCausalLM(nn.Module):
    """Before the class of a causal language model: builds that, then edits its base model."""

    base_model: nn.Module

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        with as_original(config):
            super().__init__(config, *args, **kwargs)
        edit(self.base_model, config.planned)
