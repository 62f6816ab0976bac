"""Prune: a dropped branch really leaves the model, with its weights and its KV cache.

Dropping attention in a graph leaves its keys and values, because the cache that they are written to is an output. So
the module is replaced by one that returns zeros, in the layout that the original was seen to return. Which layout that
is, and whether the module feeds a cache, is learnt from one call; nothing here knows a model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxfuse._torch.dynamo import is_off, raising
from fxfuse._torch.pytree import tree_leaves, tree_map
from fxfuse.errors import FxfuseError, PruneError, nearest
from fxfuse.model import healed
from fxfuse.model.force import uncompiled
from fxfuse.plan import Plan

log = logging.getLogger(__name__)

APART: Any = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
"""For torch.compile: graphs of our own neither serve the model's other compilations nor count towards their limit."""

Example: TypeAlias = tuple[Sequence[object], Mapping[str, object]]

_Lengths: TypeAlias = list[list[tuple[type, int]]]
"""Of each KV cache, each layer's kind and how many tokens it holds."""


@dataclass(frozen=True)
class _Source:
    """Where, among the arguments of a module, something is: position or keyword."""

    key: int | str

    def __call__(self, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        return args[self.key] if isinstance(self.key, int) else kwargs[self.key]


@dataclass(frozen=True)
class _Seen:
    """What one call of a module taught.

    Attributes:
        hidden: the argument that has the shape of the output: zeros are made like it.
        layout: the output, with True for the contribution, a ``_Source`` for an argument handed through, else None.
        dtype: of the contribution, if it is not that of ``hidden``.
        first: the module writes the first layer of its kind in a KV cache, which carries the sequence's length; or it
            is given a cache that nobody here can read.
    """

    hidden: _Source
    layout: object
    dtype: torch.dtype | None
    first: bool

    def zeros(self, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """What the module returned, with zeros for its contribution."""
        hidden = self.hidden(args, kwargs)
        assert isinstance(hidden, Tensor)
        nothing = torch.zeros_like(hidden, dtype=self.dtype)

        def fill(spot: object) -> object:
            if spot is True:
                return nothing
            return spot(args, kwargs) if isinstance(spot, _Source) else spot

        return tree_map(fill, self.layout)

    def silence(self, _: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], output: object) -> object:
        """A forward hook; a method, because a closure would keep the model from being pickled."""
        return self.zeros(args, kwargs)


class Dropped(nn.Module):
    """Stands for a branch that a plan dropped: returns zeros where the branch returned its contribution."""

    def __init__(self, original: nn.Module, seen: _Seen) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if name != "forward" and not name.startswith("_") and not isinstance(value, Tensor | nn.Module):
                setattr(self, name, value)  # what surrounding code may ask for: layer_idx, config, ...
        self.training = original.training
        self._seen = seen

    def forward(self, *args: object, **kwargs: object) -> object:
        return self._seen.zeros(args, kwargs)

    def extra_repr(self) -> str:
        return "no weights, no cache"


def _count_only(original: nn.Module, seen: _Seen) -> None:
    """Let a module that must go on writing its cache contribute nothing, under the same names as before."""
    handle = original.register_forward_hook(seen.silence, with_kwargs=True)
    original._fxfuse_silenced = handle  # type: ignore[assignment]  # a plain attribute: torch types modules' as tensors


def _count_again(module: nn.Module) -> None:
    """Take back what :func:`_count_only` did."""
    handle = vars(module).pop("_fxfuse_silenced", None)
    if isinstance(handle, RemovableHandle):
        handle.remove()


def is_dropped(module: nn.Module) -> bool:
    """Whether :func:`prune` took this module's contribution away."""
    return isinstance(module, Dropped) or hasattr(module, "_fxfuse_silenced")


def dropped_in(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules of ``model`` whose contribution :func:`prune` took away."""
    return tuple(name for name, module in model.named_modules() if is_dropped(module))


def prune(model: nn.Module, plan: Plan, *args: object, **kwargs: object) -> nn.Module:
    """Take the branches that ``plan`` drops out of ``model``, in place; returns it.

    ``args`` and ``kwargs`` are one example call; a Hugging Face model needs none. Before anything is changed for good,
    the pruned model's outputs are compared with those of the dropped graph, both in eval mode, where no dropout tells
    two calls apart; if they differ the model is put back.

    The first attention of each cache type keeps its weights and its cache, which carries the sequence's length, and
    contributes nothing.

    Raises:
        PruneError: a name is no module, a module is not called exactly once, returns nothing like its input, or its
            absence is more than zeros in its place.
        PlanError: a name is a module, but no branch of the stream; or the model was healed for another plan.
    """
    healed.check(model, plan)
    with ExitStack() as undo:
        prune_until(undo, model, plan, args, kwargs)
        undo.pop_all()
    healed.keep(model, plan.model_copy(update={"drop": dropped_in(model), "parallel": ()}))
    return model


def prune_until(
    undo: ExitStack, model: nn.Module, plan: Plan, args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    """What :func:`prune` does, for as long as ``undo`` does not close."""
    targets = {name: _module(model, name) for name in plan.drop}
    targets = {name: module for name, module in targets.items() if not is_dropped(module)}
    if not targets:
        return
    example = _example(model, args, kwargs)
    seen = _learn(model, targets, example)
    wanted = _dropped_outputs(model, Plan(drop=tuple(targets)), example)
    for name, module in targets.items():
        if seen[name].first:
            undo.callback(_count_again, module)
            _count_only(module, seen[name])
        else:
            undo.callback(_set, model, name, module)
            _set(model, name, Dropped(module, seen[name]))
    without = f"the model without {', '.join(targets)}"
    with _blaming(without):
        made = _call(model, example)
    difference = _difference(_outputs(made), wanted)
    if difference:
        raise PruneError(f"{without} is not the model with zeros in its place: {difference}")
    counting = [name for name in targets if seen[name].first]
    if counting:
        log.info("kept counting, since its cache carries the length of the sequence: %s", ", ".join(counting))


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Say of an error what could not be called; those of this library say enough."""
    try:
        yield
    except FxfuseError:
        raise
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise PruneError(f"{what} cannot be called: {type(error).__name__}: {first}") from error


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [path for path, _ in model.named_modules() if path]
        raise PruneError(
            f"{name!r} is no module of this model, so it cannot leave it{nearest(name, known)}. "
            "torch.compile with this plan drops it from the graph"
        ) from None


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, own = name.rpartition(".")
    setattr(model.get_submodule(path), own, module)


def _example(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> Example:
    if args or kwargs:
        return args, _with_cache(model, args, kwargs)
    given = getattr(model, "dummy_inputs", None)
    if not isinstance(given, Mapping):
        raise PruneError("one example call is needed to see what the dropped modules return: pass its arguments")
    device = next((parameter.device for parameter in model.parameters()), None)
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()}
    return (), _with_cache(model, (), moved)


def _with_cache(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> Mapping[str, object]:
    """The example call with a KV cache, if the model can have one: ``generate`` will, whatever the example says."""
    takes = inspect.signature(model.forward)
    try:
        free = "use_cache" in takes.parameters and "use_cache" not in takes.bind_partial(*args).arguments
    except TypeError as error:
        raise PruneError(f"the example is no call of the model: {error}") from error
    return {**kwargs, "use_cache": True} if free or "use_cache" in kwargs else kwargs


@contextmanager
def _trial(model: nn.Module) -> Iterator[None]:
    """For calls that leave no trace: the model's own code, in eval mode, and no random numbers used up."""
    training = [module for module in model.modules() if module.training]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        for module in training:
            module.training = False  # not .eval(), which models override, and which knows no way back to mixed modes
        with uncompiled(model), torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module in training:
            module.training = True


def _call(model: nn.Module, example: Example) -> object:
    with _trial(model):
        return model(*example[0], **example[1])


def _learn(model: nn.Module, targets: Mapping[str, nn.Module], example: Example) -> dict[str, _Seen]:
    """Call the model once and watch ``targets``."""
    seen: dict[str, list[_Seen]] = {name: [] for name in targets}
    with ExitStack() as watching:
        for name, module in targets.items():
            watching.enter_context(_watched(name, module, seen[name]))
        with _blaming("the model, with the example given,"):
            _call(model, example)
    for name, calls in seen.items():
        if len(calls) != 1:
            raise PruneError(
                f"{name!r} was called {len(calls)} times in one call of the model; it leaves only if called once"
            )
    return {name: calls[0] for name, calls in seen.items()}


@contextmanager
def _watched(name: str, module: nn.Module, seen: list[_Seen]) -> Iterator[None]:
    """Let each call of ``module`` add to ``seen`` what it taught: of its ``forward``, which some models call by name.

    No hook would see those calls.
    """
    own, forward = vars(module).get("forward"), module.forward

    def watch(*args: object, **kwargs: object) -> object:
        before = _lengths(args, kwargs)
        output = forward(*args, **kwargs)
        seen.append(_observe(name, args, kwargs, output, _is_first(before, _lengths(args, kwargs))))
        return output

    try:
        module.forward = watch
        yield
    finally:
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own


def _observe(name: str, args: Sequence[object], kwargs: Mapping[str, object], output: object, first: bool) -> _Seen:
    given: list[tuple[_Source, object]] = [(_Source(index), value) for index, value in enumerate(args)]
    given += [(_Source(key), value) for key, value in kwargs.items()]
    contribution = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if contribution is None:
        raise PruneError(f"{name!r} returns no tensor")
    alike = [source for source, value in given if isinstance(value, Tensor) and value.shape == contribution.shape]
    if not alike:
        raise PruneError(f"{name!r} returns {tuple(contribution.shape)}, which is the shape of none of its inputs")
    hidden = alike[0](args, kwargs)
    assert isinstance(hidden, Tensor)

    def place(leaf: object) -> object:
        if leaf is contribution:
            return True
        return next((source for source, value in given if value is leaf and leaf is not None), None)

    dtype = contribution.dtype if contribution.dtype != hidden.dtype else None
    return _Seen(alike[0], tree_map(place, output), dtype, first)


def _lengths(args: Sequence[object], kwargs: Mapping[str, object]) -> _Lengths | None:
    """Of the KV caches among a module's arguments, which can tell the length of the sequence; None if one says no more.

    An encoder-decoder's cache has no layers: it holds two caches that have.
    """
    lengths: _Lengths = []
    for value in (*args, *kwargs.values()):
        if not hasattr(value, "get_seq_length"):
            continue
        parts = (value, *getattr(value, "__dict__", {}).values())
        held = [getattr(each, "layers", None) for each in parts if hasattr(each, "get_seq_length")]
        caches = [list(layers) for layers in held if isinstance(layers, Iterable)]
        if not caches or not all(hasattr(layer, "get_seq_length") for layers in caches for layer in layers):
            return None
        lengths += [[(type(layer), int(layer.get_seq_length())) for layer in layers] for layers in caches]
    return lengths


def _is_first(before: _Lengths | None, after: _Lengths | None) -> bool:
    """Whether what was written meanwhile is the first layer of its kind in its cache, or nobody can tell."""
    if before is None or after is None or len(before) != len(after):
        return True
    return any(
        [layer] != old[index : index + 1] and all(kind is not layer[0] for kind, _ in new[:index])
        for old, new in zip(before, after, strict=True)
        for index, layer in enumerate(new)
    )


def _dropped_outputs(model: nn.Module, plan: Plan, example: Example) -> list[Tensor]:
    """What the model computes with ``plan``'s branches dropped from its graphs."""
    if is_off():
        raise PruneError(
            "torch.compile is switched off (TORCH_COMPILE_DISABLE, or torch._dynamo.config.disable), so nobody can "
            "tell what the model computes without these branches; switch it on"
        )
    options: Any = {"plan": plan, "inner": "eager", "strict": True}  # torch hands on what its annotation forbids
    with _trial(model), healed.unchecked(), _blaming("the model, compiled with the plan,"), raising(FxfuseError):
        return _outputs(torch.compile(model, backend="ffnfuse", options=options)(*example[0], **example[1]))


def _outputs(output: object) -> list[Tensor]:
    """The floating tensors that a call returns, but for those in a cache."""
    if isinstance(output, Mapping):
        output = [value for value in output.values() if not hasattr(value, "get_seq_length")]
    elif isinstance(output, tuple | list):
        output = [value for value in output if not hasattr(value, "get_seq_length")]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _difference(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    if [tensor.shape for tensor in made] != [tensor.shape for tensor in wanted]:
        return "its outputs have other shapes"
    for one, other in zip(made, wanted, strict=True):
        scale = other.double().abs().max().clamp_min(1e-30)
        error = float((one.double() - other.double()).abs().max() / scale)
        if not error <= torch.finfo(other.dtype).eps ** 0.5:
            return f"its outputs differ by {error:.2g} of the largest"
    return ""
