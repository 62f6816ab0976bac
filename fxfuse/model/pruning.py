"""Prune: a branch that a plan drops, or what one no longer needs, really leaves the model, KV cache included.

Dropping attention in a graph leaves its keys and values, because the cache that they are written to is an output. So
the module is replaced (:mod:`fxfuse.model.stand_ins`) by one that returns zeros, or one linear map of its input, in the
layout that the original was seen to return (:mod:`fxfuse.model.learning`). An FFN that is narrowed keeps its modules,
whose parameters become smaller (:mod:`fxfuse.model.narrowing`). Nothing here knows a model.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fxfuse._common.units import Units
from fxfuse._torch.apart import APART, forget, twin
from fxfuse._torch.dynamo import is_off, raising
from fxfuse._torch.pytree import tree_leaves
from fxfuse.errors import FxfuseError, PlanError, PruneError, nearest
from fxfuse.model import healed
from fxfuse.model.learning import Example, blaming, call, learn, trial
from fxfuse.model.narrowing import narrowed_in, take_units, units_of
from fxfuse.model.stand_ins import (
    Dropped,
    MadeLinear,
    as_before,
    count_and_map,
    count_only,
    is_dropped,
    is_linear,
    new_map,
)
from fxfuse.passes.linear import OutputMap, output_maps
from fxfuse.passes.unit_weights import Part, unit_weights
from fxfuse.plan import Plan

log = logging.getLogger(__name__)

FactT = TypeVar("FactT")


def dropped_in(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules of ``model`` whose contribution :func:`prune` took away."""
    return tuple(name for name, module in model.named_modules() if is_dropped(module))


def linear_in(model: nn.Module) -> tuple[str, ...]:
    """The names of the modules of ``model`` that :func:`prune` made linear."""
    return tuple(name for name, module in model.named_modules() if is_linear(module))


def prune(model: nn.Module, plan: Plan, *args: object, **kwargs: object) -> nn.Module:
    """Take out of ``model`` what ``plan`` drops, and what its other branches no longer need, in place; returns it.

    ``args`` and ``kwargs`` are one example call; a Hugging Face model needs none. Before anything is changed for good,
    the pruned model's outputs are compared with those of the planned graph, both in eval mode, where no dropout tells
    two calls apart; if they differ the model is put back.

    An attention that is made linear keeps its output projection, under its name, and the modules that follow it there.
    Where that projection does not read what the attention is given, a new ``linear`` of the stream's width takes its
    place. It holds zeros, so that it contributes nothing until it is fitted or loaded.

    An FFN that is narrowed keeps its modules, and these the rows and columns of its units, in new parameters: make an
    optimizer after this.

    The first attention of each cache type keeps its weights and its cache, which carries the sequence's length.

    Raises:
        PruneError: a name is no module, a module is not called exactly once, returns nothing like its input, or what is
            put in its place is not what the plan says.
        PlanError: a name is a module, but no branch of the stream; or one to be made linear is no attention, or one to
            be narrowed no FFN with parameters of its own; or the model was healed for another plan.
    """
    healed.check(model, plan)
    with ExitStack() as undo:
        prune_until(undo, model, plan, args, kwargs)
        undo.pop_all()
    edits = {"drop": dropped_in(model), "linear": linear_in(model), "narrow": narrowed_in(model), "parallel": ()}
    healed.keep(model, plan.model_copy(update=edits))
    return model


def prune_until(
    undo: ExitStack, model: nn.Module, plan: Plan, args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    """What :func:`prune` does, for as long as ``undo`` does not close."""
    dropped = {name: module for name in plan.drop if not is_dropped(module := _module(model, name))}
    linear = {name: module for name in plan.linear if not is_linear(module := _module(model, name))}
    for name, module in linear.items():
        if is_dropped(module):
            raise PruneError(f"{name!r} was dropped from this model: apply the plan to the model as it was before")
    narrow = {name: units for name, units in plan.narrow.items() if _has_more(model, name, units)}
    if not dropped and not linear and not narrow:
        return
    example = _example(model, args, kwargs)
    maps = _output_maps(model, linear, example)
    parts = _unit_weights(model, narrow, example)
    linear = {name: module for name, module in linear.items() if name in maps}
    seen = learn(model, {**dropped, **linear}, example, {name: each.path for name, each in maps.items()})
    fitting = tuple(name for name, each in maps.items() if each.fits)
    # A new map holds zeros, so what gets one contributes nothing.
    leaving = (*dropped, *(name for name in maps if name not in fitting))
    wanted = _planned_outputs(model, Plan(drop=leaving, linear=fitting, narrow=narrow), example)
    for name, module in dropped.items():
        if seen[name].first:
            undo.callback(as_before, module, added=False)
            count_only(module, seen[name])
        else:
            undo.callback(_set, model, name, module)
            _set(model, name, Dropped(module, seen[name]))
    for name, module in linear.items():
        own = None if maps[name].fits else new_map(module, seen[name], maps[name].width)
        if seen[name].first:
            count_and_map(name, module, seen[name], own)
            undo.callback(as_before, module, added=own is not None)
        else:
            undo.callback(_set, model, name, module)
            _set(model, name, MadeLinear(module, seen[name], own))
    for name, units in narrow.items():
        take_units(undo, model, name, units, parts[name])
    _check(model, Plan(drop=tuple(dropped), linear=tuple(linear), narrow=narrow), example, wanted)
    counting = [name for name in (*dropped, *linear) if seen[name].first]
    if counting:
        log.info("kept counting, since its cache carries the length of the sequence: %s", ", ".join(counting))


def _check(model: nn.Module, plan: Plan, example: Example, wanted: Sequence[Tensor]) -> None:
    """Raise unless the pruned model computes what is wanted."""
    what = [f"the model without {', '.join(plan.drop)}"] * bool(plan.drop)
    what += [f"the model with {', '.join(plan.linear)} made linear"] * bool(plan.linear)
    what += [f"the model with {', '.join(plan.narrow)} narrowed"] * bool(plan.narrow)
    instead = ["zeros in its place"] * bool(plan.drop) + ["a linear map in its place"] * bool(plan.linear)
    instead += ["zeros for the units that it does not keep"] * bool(plan.narrow)
    with blaming(", and ".join(what)):
        made = call(model, example)
    difference = _difference(_outputs(made), wanted)
    if difference:
        raise PruneError(f"{', and '.join(what)} is not the model with {' and '.join(instead)}: {difference}")


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [path for path, _ in model.named_modules() if path]
        raise PruneError(
            f"{name!r} is no module of this model, so nothing of it can leave{nearest(name, known)}. "
            "torch.compile with this plan edits it in the graph"
        ) from None


def _has_more(model: nn.Module, name: str, units: Units) -> bool:
    """Whether an FFN of the model has other units than these, which have to leave."""
    module = _module(model, name)
    if is_dropped(module):
        raise PruneError(f"{name!r} was dropped from this model: apply the plan to the model as it was before")
    kept = units_of(module)
    if kept is not None and kept != units:
        raise PruneError(
            f"{name!r} of this model has kept {len(kept)} hidden units, and not those of the plan: apply the plan to "
            "the model as it was before"
        )
    return kept is None


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, own = name.rpartition(".")
    setattr(model.get_submodule(path), own, module)


def _example(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> Example:
    if args or kwargs:
        return args, _with_cache(model, args, kwargs)
    given = getattr(model, "dummy_inputs", None)
    if not isinstance(given, Mapping):
        raise PruneError("one example call is needed to see what the pruned modules return: pass its arguments")
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


def _output_maps(model: nn.Module, names: Collection[str], example: Example) -> dict[str, OutputMap]:
    """Of each attention named, its output projection; of what is a linear map already, none.

    Raises:
        PlanError: a name is no branch, or no attention.
    """
    found = _told_by_graphs(model, names, example, lambda gm: output_maps(gm, names))
    return {name: each for name, each in found.items() if each is not None}


def _unit_weights(model: nn.Module, units: Mapping[str, Units], example: Example) -> dict[str, tuple[Part, ...]]:
    """Of each FFN named what its parameters keep.

    Raises:
        PlanError: a name is no branch, or no FFN whose units can leave.
    """
    return _told_by_graphs(model, units, example, lambda gm: unit_weights(gm, units))


def _told_by_graphs(
    model: nn.Module,
    names: Collection[str],
    example: Example,
    tell: Callable[[fx.GraphModule], tuple[Mapping[str, FactT], Sequence[str]]],
) -> dict[str, FactT]:
    """What ``tell`` says of each branch named, from the graph that holds it; it also gives all branches of a graph.

    Raises:
        PlanError: no graph has a branch of such a name.
    """
    found: dict[str, FactT] = {}
    known: list[str] = []

    def look(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., object]:
        facts, branches = tell(gm)
        found.update(facts)
        known.extend(branches)
        return gm.forward

    if not names:
        return {}
    _compiled(model, Plan(), look, example)
    for name in names:
        if name not in found:
            raise PlanError(f"{name!r} is no branch of the model's stream{nearest(name, known)}")
    return {name: found[name] for name in names}


def _planned_outputs(model: nn.Module, plan: Plan, example: Example) -> list[Tensor]:
    """What the model computes with ``plan`` applied to its graphs."""
    return _outputs(_compiled(model, plan, "eager", example))


def _compiled(model: nn.Module, plan: Plan, inner: object, example: Example) -> object:
    """What one call of the model returns, compiled with ``plan`` and ``inner``."""
    if is_off():
        raise PruneError(
            "torch.compile is switched off (TORCH_COMPILE_DISABLE, or torch._dynamo.config.disable), so nobody can "
            "tell what the model computes under this plan; switch it on"
        )
    options: Any = {"plan": plan, "inner": inner, "strict": True}  # torch hands on what its annotation forbids
    handle = twin(model)
    try:
        with trial(model), healed.unchecked(), blaming("the model, compiled with the plan,"), raising(FxfuseError):
            return torch.compile(handle, backend="ffnfuse", options=options, **APART)(*example[0], **example[1])
    finally:
        forget(handle)


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
