"""Stand-ins: small modules in the place of a branch that a plan dropped, or of an attention that it made linear.

They are called as the original was, and return what it returned in the same layout. An original that has to go on
writing its KV cache, because that carries the length of the sequence, stays and gets a hook that does the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxfuse.errors import PruneError
from fxfuse.model.learning import Seen

OWN_MAP = "linear"
"""The attribute of a stand-in that holds a linear map of its own, where the output projection does not fit."""


@dataclass(frozen=True)
class Zeros:
    """Contributes nothing."""

    seen: Seen

    def __call__(self, _: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        nothing = torch.zeros_like(self.seen.input(args, kwargs), dtype=self.seen.dtype)
        return self.seen.output(args, kwargs, nothing)

    def instead(self, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], _: object) -> object:
        """A forward hook; a method, because a closure would keep the model from being pickled."""
        return self(module, args, kwargs)


@dataclass(frozen=True)
class LinearMap:
    """Contributes what some parts of the module, one after the other, make of its input.

    Attributes:
        seen: what one call of the original taught.
        parts: their paths: a linear map, and what follows it.
    """

    seen: Seen
    parts: tuple[str, ...]

    def __call__(self, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        made = self.seen.input(args, kwargs)
        for path in self.parts:
            made = module.get_submodule(path)(made)  # by path: others may have put something else there (an adapter)
        return self.seen.output(args, kwargs, made)

    def instead(self, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], _: object) -> object:
        """A forward hook."""
        return self(module, args, kwargs)


class StandIn(nn.Module):
    """Stands for a module, and has its plain attributes."""

    def __init__(self, original: nn.Module, contributes: Zeros | LinearMap) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if name != "forward" and not name.startswith("_") and not isinstance(value, Tensor | nn.Module):
                setattr(self, name, value)  # what surrounding code may ask for: layer_idx, config, ...
        self.training = original.training
        self._contributes = contributes

    def forward(self, *args: object, **kwargs: object) -> object:
        return self._contributes(self, args, kwargs)


class Dropped(StandIn):
    """Stands for a branch that a plan dropped: returns zeros where the branch returned its contribution."""

    def __init__(self, original: nn.Module, seen: Seen) -> None:
        super().__init__(original, Zeros(seen))

    def extra_repr(self) -> str:
        return "no weights, no cache"


class MadeLinear(StandIn):
    """Stands for an attention that a plan made linear: one linear map of each token, and what followed the original's.

    The output projection is the original's own, under its own name, or :data:`OWN_MAP` if that does not fit.
    """

    def __init__(self, original: nn.Module, seen: Seen, own: nn.Linear | None) -> None:
        parts = seen.ends if own is None else (OWN_MAP, *seen.ends[1:])
        super().__init__(original, LinearMap(seen, parts))
        for path in parts:
            _place(self, path, original.get_submodule(path) if own is None or path != OWN_MAP else own)

    def extra_repr(self) -> str:
        return "no scores, no cache"


def _place(module: nn.Module, path: str, part: nn.Module) -> None:
    """Put ``part`` at ``path`` below ``module``, under modules that hold nothing else."""
    *above, own = path.split(".")
    for name in above:
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    module.add_module(own, part)


def new_map(original: nn.Module, seen: Seen, width: int) -> nn.Linear:
    """A map of the stream's width to itself that holds zeros, and so contributes nothing yet.

    It has a bias if the output projection has one, and the dtype and device of the floating-point weights of that one.
    """
    projection = original.get_submodule(seen.ends[0])
    like = next((p for p in projection.parameters() if p.is_floating_point()), None)
    made = nn.Linear(width, width, bias=getattr(projection, "bias", None) is not None)
    if like is not None:
        made.to(device=like.device, dtype=like.dtype)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made


_SILENCED, _LINEAR = "_fxfuse_silenced", "_fxfuse_linear"


def count_only(original: nn.Module, seen: Seen) -> None:
    """Let a module that must go on writing its cache contribute nothing, under the same names as before."""
    _hook(original, _SILENCED, Zeros(seen))


def count_and_map(name: str, original: nn.Module, seen: Seen, own: nn.Linear | None) -> None:
    """Let a module that must go on writing its cache contribute a linear map of its input, under the same names."""
    if own is not None and hasattr(original, OWN_MAP):
        raise PruneError(
            f"{name!r} has a part {OWN_MAP!r} already, which is what its linear map is called: rename that"
        )
    if own is not None:
        original.add_module(OWN_MAP, own)
    _hook(original, _LINEAR, LinearMap(seen, seen.ends if own is None else (OWN_MAP, *seen.ends[1:])))


def _hook(module: nn.Module, name: str, contributes: Zeros | LinearMap) -> None:
    setattr(module, name, module.register_forward_hook(contributes.instead, with_kwargs=True))


def as_before(module: nn.Module, added: bool) -> None:
    """Take back the last that :func:`count_only` or :func:`count_and_map` did, with the map that was ``added``."""
    handle = vars(module).pop(_SILENCED, None) or vars(module).pop(_LINEAR, None)
    if isinstance(handle, RemovableHandle):
        handle.remove()
    if added:
        delattr(module, OWN_MAP)


def has_own_map(module: nn.Module) -> bool:
    """Whether pruning gave this module a linear map of its own."""
    return is_linear(module) and OWN_MAP in dict(module.named_children())


def is_dropped(module: nn.Module) -> bool:
    """Whether pruning took this module's contribution away."""
    return isinstance(module, Dropped) or hasattr(module, _SILENCED)


def is_linear(module: nn.Module) -> bool:
    """Whether pruning made this module's contribution a linear map."""
    return not is_dropped(module) and (isinstance(module, MadeLinear) or hasattr(module, _LINEAR))
