"""Healed weights serve one plan: a mark on the model says which, and whoever runs it without that plan is told.

The mark is the plan itself, so wherever the mark is, nothing is missing. On a model of Hugging Face it is an entry of
its config: ``save_pretrained`` writes that to config.json and ``from_pretrained`` reads it back, for every
architecture, while a buffer would be dropped as unexpected on loading, and be in the way of other readers of the
weights. A home-made model has no such config: there it is a buffer, which goes wherever ``state_dict`` goes, and which
``load_state_dict`` into an unmarked model refuses by its name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fxfuse._torch.compiled import original
from fxfuse.errors import PlanError
from fxfuse.graph.values import unwrapped
from fxfuse.model.mark import ENTRY, Mark, read_mark
from fxfuse.model.narrowing import narrowed_in
from fxfuse.model.stand_ins import has_own_map
from fxfuse.plan import Plan

BUFFER = "fxfuse_healed_for"
"""The buffer of a module without a config: the plan's JSON, uint8."""


@runtime_checkable
class _Config(Protocol):
    """What a Hugging Face config can do, and nothing else that modules call ``config``."""

    def save_pretrained(self, folder: str) -> None: ...
    def to_dict(self) -> dict[str, object]: ...


def mark_healed(model: nn.Module, plan: Plan) -> None:
    """Say that the weights of ``model`` were changed to serve ``plan``; in place.

    Raises:
        PlanError: the plan is empty, or the model is healed for another plan.
    """
    if not plan:
        raise PlanError("an empty plan changes nothing, so no weights were healed for it")
    check(model, plan)
    if _config(model) is not None:
        _write(model, plan, healed=True)
    else:
        text = torch.tensor(list(plan.to_json().encode()), dtype=torch.uint8)
        _bare(model).register_buffer(BUFFER, text)


def marks(model: nn.Module) -> Callable[[], None]:
    """A function that gives ``model`` the mark again that it has now, or none if it has none."""
    configs = [(module, vars(module)["config"]) for module in _bare(model).modules() if "config" in vars(module)]
    buffer: object = getattr(_bare(model), BUFFER, None)

    def restore() -> None:
        for module, config in configs:
            module.config = config
        if isinstance(buffer, Tensor):
            _bare(model).register_buffer(BUFFER, buffer)
        elif hasattr(_bare(model), BUFFER):
            delattr(_bare(model), BUFFER)

    return restore


def healed_for(model: nn.Module | Mapping[str, Tensor]) -> Plan | None:
    """The plan that the weights of a model, or of a ``state_dict``, were healed for; None if they were not.

    Raises:
        PlanError: there is a mark that is no plan.
    """
    if isinstance(model, nn.Module):
        mark = _read(model)
        if mark is not None and mark.healed:
            return mark.plan
        buffer: object = getattr(_bare(model), BUFFER, None)
    else:
        buffer = model.get(BUFFER)
    if not isinstance(buffer, Tensor):
        return None
    return Plan.from_json(bytes(buffer.tolist()).decode(errors="replace"), source=f"the buffer {BUFFER}")


def keep(model: nn.Module, plan: Plan) -> None:
    """Let ``save_pretrained`` write a plan that was applied, of which a loader can tell; in place.

    A plan that drops has taken weights out of the model, and a loader would find none to put there. What is healed
    stays so. A model without a Hugging Face config keeps nothing: there is nothing that ``fxfuse`` could write it to.
    """
    if _config(model) is not None and healed_for(model) is None and (plan or _read(model) is not None):
        _write(model, plan, healed=False)


def kept(model: nn.Module) -> Plan | None:
    """The plan that a model was healed for, or that was applied to it when it was saved; None if there is none.

    Raises:
        PlanError: there is a mark that is no plan.
    """
    mark = _read(model)
    return healed_for(model) if mark is None else mark.plan


def maps_of(model: nn.Module) -> tuple[str, ...]:
    """The attentions that had a linear map of their own when the model was marked, by its mark."""
    mark = _read(model)
    return () if mark is None else mark.maps


def check(model: nn.Module, plan: Plan) -> None:
    """See that a model which was healed runs under its plan, and has all the weights that this takes.

    ``plan`` may name branches from further out or further in than the mark does, as parts and wrappers of a model do.

    Raises:
        PlanError: it was healed for another plan; the message says which. Or the linear maps of its attentions are not
            there: ``from_pretrained`` knows nothing of them.
    """
    if _unchecked.get():
        return
    modules = dict(_bare(model).named_modules())
    if bare := [name for name in maps_of(model) if name in modules and not has_own_map(modules[name])]:
        raise PlanError(
            f"{bare[0]!r} of this model is a linear map in its checkpoint, which from_pretrained does not load: load "
            "the folder by fxfuse.data.loading.load"
        )
    if (healed := healed_for(model)) is None or _same(plan, healed):
        return
    given = f"and is given another ({_short(plan)})" if plan else "and is given none"
    raise PlanError(
        f"this model was healed for a plan ({_short(healed)}) {given}: its weights are damaged without the plan that "
        "they were healed for. Give that plan (fxfuse.model.healed.healed_for(model) returns it), or load the weights "
        "as they were before"
    )


_unchecked: ContextVar[bool] = ContextVar("unchecked", default=False)


@contextmanager
def unchecked() -> Iterator[None]:
    """For our own calls of a model under a part of its plan."""
    token = _unchecked.set(True)
    try:
        yield
    finally:
        _unchecked.reset(token)


def _bare(model: nn.Module) -> nn.Module:
    return unwrapped(original(model))


def _config(model: nn.Module) -> _Config | None:
    config: object = getattr(_bare(model), "config", None)
    return config if isinstance(config, _Config) and not isinstance(config, type) else None


def _read(model: nn.Module) -> Mark | None:
    entry: object = getattr(_config(model), ENTRY, None)
    return None if entry is None else read_mark(entry)


def _write(model: nn.Module, plan: Plan, healed: bool) -> None:
    """Give the model, and the parts that share its config, a config of their own: other models may share it too."""
    old = _config(model)
    new = copy.copy(old)
    if plan:
        maps = tuple(name for name, module in _bare(model).named_modules() if has_own_map(module))
        narrowed = tuple(name for name in narrowed_in(_bare(model)) if name in plan.narrow)
        setattr(new, ENTRY, Mark(plan, healed, maps, narrowed).entry())
    else:
        vars(new).pop(ENTRY, None)
    for module in _bare(model).modules():
        if vars(module).get("config") is old:
            module.config = new  # type: ignore[assignment]  # torch types the attributes of modules as tensors


def _same(one: Plan, other: Plan) -> bool:
    """Whether two plans are the same edits, but for a prefix of all names of one of them."""
    if one.digest == other.digest:
        return True
    if not one or not other:
        return False
    shorter, longer = sorted((one, other), key=lambda plan: min(map(len, plan.names)))
    names, full = sorted(shorter.names), sorted(longer.names)
    prefix = full[0].removesuffix(names[0])
    return prefix.endswith(".") and _prefixed(shorter, prefix).digest == longer.digest


def _prefixed(plan: Plan, prefix: str) -> Plan:
    def named(entry: object) -> object:
        if isinstance(entry, str):
            return prefix + entry
        return tuple(map(named, entry)) if isinstance(entry, tuple) else entry

    narrow = {prefix + name: units for name, units in plan.narrow.items()}
    edits = plan.model_dump(exclude={"narrow", "why"})
    return Plan(**{kind: named(entries) for kind, entries in edits.items()}, narrow=narrow)


def _short(plan: Plan) -> str:
    """As in ``3f2a9c01: 6 dropped, 2 groups, of 'model.layers.5.self_attn', ...``."""
    counts = f"{len(plan.drop)} dropped, {len(plan.narrow)} narrowed, {len(plan.parallel)} groups"
    return f"{plan.digest[:8]}: {counts}, of {plan.names[0]!r}, ..."
