"""Apply: the planned model in place of the model, for whoever calls it: ``generate``, Trainer, lm-eval."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxfuse._common.units import Narrowed
from fxfuse._torch.apart import own_code
from fxfuse._torch.compiled import COMPILED_CALL, compiled_call, set_compiled_call, uncompiled_call
from fxfuse._torch.dynamo import skips
from fxfuse._torch.modules import PARTS, pre_hooks
from fxfuse.backend.options import Compiler, Options
from fxfuse.model import healed
from fxfuse.model.force import Watch, watch_of, without_watches
from fxfuse.model.narrowing import narrowed_in
from fxfuse.model.pruning import dropped_in, linear_in, prune_until
from fxfuse.plan import Plan


def apply(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str],
    inner: str | Compiler = "inductor",
    example: Mapping[str, object] | tuple[object, ...] | Tensor | None = None,
    **options: object,
) -> nn.Module:
    """Let ``model`` compute what ``plan`` says from now on, in place: prune it, then ``model.compile``.

    A ``copy.deepcopy`` of it follows the plan as well. What was pickled (``torch.save(model)``) does not, as nothing
    compiled can be pickled: apply the plan again to what was loaded. Groups hold where the model itself is called; what
    would run its code without them (``torch.export``, a call of a part of it) raises :class:`PlanError`.

    ``save_pretrained`` of a Hugging Face model writes the plan to config.json, and ``fxfuse.data.loading.load`` of that
    folder returns it: what was dropped has no weights to load.

    Args:
        model: any module; its class, its ``state_dict`` keys and its methods stay.
        plan: the plan, or the path of one.
        inner: the compiler of the rewritten graphs; "eager" runs the planned model uncompiled.
        example: the arguments of one call, from which pruning learns what the modules that it replaces return; a
            Hugging Face model needs none, and a plan that only has groups neither.
        options: other options of the backend, see :class:`fxfuse.backend.options.Options`.

    Raises:
        PlanError, OptionError: the plan or an option is not valid, a pruned module is no branch, or the model was
            healed for another plan.
        PruneError: a dropped branch, an attention made linear, or units of a narrowed FFN cannot leave the model. After
            any of these the model is as it was.
    """
    given: dict[str, object] = {"plan": plan, "inner": inner, **options}
    chosen = Options.parse(given)
    given["plan"], edits = chosen.plan, chosen.edits  # a file that changes later must not part pruning from compiling
    healed.check(model, edits)
    leaving = of_modules(edits)
    with ExitStack() as undo:
        if isinstance(example, Mapping):
            prune_until(undo, model, leaving, (), example)
        elif isinstance(example, tuple):
            prune_until(undo, model, leaving, example, {})
        else:
            prune_until(undo, model, leaving, () if example is None else (example,), {})
        undo.callback(_put_back, [(module, _state(module)) for module in model.modules()])
        if (old := watch_of(model)) is not None:
            old.remove(model)
        if edits != leaving:
            Watch(edits).put(model)
        _compile(model, given, edits)
        gone = {"drop": (*edits.drop, *dropped_in(model)), "linear": (*edits.linear, *linear_in(model))}
        narrow = Narrowed({**edits.narrow, **narrowed_in(model)})
        held = {kind: tuple(dict.fromkeys(names)) for kind, names in gone.items()}
        healed.keep(model, edits.model_copy(update={**held, "narrow": narrow}))
        undo.pop_all()
    return model


def of_modules(plan: Plan) -> Plan:
    """What of a plan can leave the modules; a branch that is called by its number is edited in the graph alone."""
    narrow = {name: units for name, units in plan.narrow.items() if not name.startswith("@")}
    return Plan(drop=_modules(plan.drop), linear=_modules(plan.linear), narrow=narrow)


def _modules(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if not name.startswith("@"))


_State: TypeAlias = tuple[dict[str, object], dict[int, Callable[..., object]]]

_CALLED = (COMPILED_CALL, "__deepcopy__", PARTS)
"""The attributes of a module that applying a plan sets."""


def _state(module: nn.Module) -> _State:
    own = vars(module)
    return {name: own[name] for name in _CALLED if name in own}, dict(pre_hooks(module))


def _put_back(states: list[tuple[nn.Module, _State]]) -> None:
    """Let modules be called and copied as before."""
    for module, (own, hooks) in states:
        for name in _CALLED:
            vars(module).pop(name, None)
        vars(module).update(own)
        pre_hooks(module).clear()
        pre_hooks(module).update(hooks)


def _compile(model: nn.Module, options: Mapping[str, object], plan: Plan) -> nn.Module:
    watch = watch_of(model)

    def own() -> Any:  # torch takes the filter out, and hands on what its annotation forbids
        return {**options} if watch is None else {**options, "guard_filter_fn": without_watches}

    model.compile(backend="ffnfuse", options=own())
    if skips(model.forward):
        # Dynamo skips what is torch's own, such as nn.Sequential's forward, and would compile each child by itself.
        call = uncompiled_call(model)

        def frame(*args: object, **kwargs: object) -> object:
            return call(*args, **kwargs)

        set_compiled_call(model, torch.compile(own_code(frame), backend="ffnfuse", options=own()))
    compiled = compiled_call(model)
    assert compiled is not None
    set_compiled_call(model, (watch or Watch(plan)).over(compiled, watching=watch is not None))
    vars(model)["__deepcopy__"] = _Copier(model, options, plan)  # copy asks the object, and not only its class
    return model


class _Copier:
    """Lets copies of a model follow its plan: ``nn.Module`` leaves behind what was compiled, and says nothing."""

    def __init__(self, model: nn.Module, options: Mapping[str, object], plan: Plan) -> None:
        self._model, self._options, self._plan = model, options, plan
        self._compiled = compiled_call(model)

    def __call__(self, memo: dict[int, object]) -> nn.Module:
        own = vars(self._model)
        del own["__deepcopy__"]
        try:
            made = copy.deepcopy(self._model, memo)
        finally:
            own["__deepcopy__"] = self
        if compiled_call(self._model) is not self._compiled:
            return made  # somebody has compiled the model anew, and its copies follow no plan either
        return _compile(made, self._options, self._plan)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickled, it is None, which copy takes for no wish of the object's own."""
        return type(None), ()
