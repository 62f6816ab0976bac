"""In force: the code of a model to which a plan was applied runs as the plan has it, or not at all.

What ``fxfuse.apply`` compiles stands in ``model.__call__``, and much goes past that: a torch.compile of what holds the
model (Dynamo inlines the original code), torch.export, vmap, ``set_stance``, a call of a part of the model. So each
module that a group moves has a hook, which asks, whenever its code runs or is traced, who is asking.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fxfuse._torch.compiled import COMPILED_CALL, set_compiled_call
from fxfuse._torch.dynamo import GuardFilterEntry, Unsupported, get_eval_frame_callback, skip
from fxfuse._torch.modules import holds_weights, parts, pre_hooks, put_first, set_parts
from fxfuse._torch.pytree import constant_in_graphs
from fxfuse._torch.tracing import chosen_backend, traced_with
from fxfuse.errors import PlanError
from fxfuse.graph.values import clean, unwrapped
from fxfuse.plan import Plan, edits_of, flat

Call = Callable[..., object]


class NotInForceError(PlanError, Unsupported):
    """Dynamo traces original code where a plan should be in force.

    Dynamo breaks its graph for what is ``Unsupported``, and calls what it could not trace: the model, as the plan has
    it. Where it may not break a graph it raises this.
    """


class _Here(threading.local):
    """What goes on in this thread.

    Attributes:
        running: the watches of the applied models that are being called, the innermost last.
        originals: how many of those who want the original code are at work.
        graphs: how many graphs that follow a plan have run.
    """

    def __init__(self) -> None:
        self.running: list[Watch] = []
        self.originals = 0
        self.graphs = 0


_here = _Here()


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Calls of ``model`` run its own code, though it may have been compiled in place, or a plan been applied to it."""
    compiled = vars(model).pop(COMPILED_CALL, None)
    _here.originals += 1
    try:
        yield
    finally:
        _here.originals -= 1
        if compiled is not None:
            set_compiled_call(model, compiled)


def told(graph: Call) -> Call:
    """A compiled graph that follows a plan, and tells so when it runs."""

    def run(*args: object) -> object:
        _here.graphs += 1
        return graph(*args)

    return run


class _Watched(dict[str, nn.Module | None]):
    """The dict of the parts of a module that holds several branches of a group.

    Its type is what tells Dynamo, whose graphs depend on no hooks, that what it traced before there were any, or for
    another model of the same class, does not serve.
    """


@constant_in_graphs
class Watch:
    """Sees to it that ``plan`` is in force wherever the code that it regroups runs.

    One object serves all modules of a model; copied and pickled with them, it is one object again.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __eq__(self, other: object) -> bool:
        return self is other  # said here, as `constant_in_graphs` wants it said

    __hash__ = object.__hash__

    def put(self, model: nn.Module) -> None:
        """Watch the modules of ``model`` that compute what the plan regroups, and those that hold them.

        The former may run though the module that the plan names is never called: some compute a branch in a method.
        """
        named = dict(unwrapped(model).named_modules(remove_duplicate=False))
        moved = {name for group in self.plan.parallel for name in flat(group)}
        if unwrapped(model) is not model:
            moved = {name.removeprefix("module.") for name in moved}
        members = {path: module for path, module in named.items() if path and clean(path) in moved}
        held = Counter(named[path] for member in members for path in _above(member))
        for holder in {*held, model}:
            put_first(holder, self.at_root if holder is model else self.at_holder)
            if holder is model or (held[holder] > 1 and not isinstance(holder, nn.ModuleList)):
                set_parts(holder, _Watched(parts(holder)))
        for part in {part for member in members.values() for part in _computing(member)} - {*held, model}:
            put_first(part, self.at_member)

    def remove(self, model: nn.Module) -> None:
        """Watch ``model`` no longer."""
        for module in model.modules():
            hooks = pre_hooks(module)
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
            if not any(isinstance(getattr(hook, "__self__", None), Watch) for hook in hooks.values()):
                set_parts(module, dict(parts(module)))

    def at_holder(self, module: nn.Module, args: object) -> None:
        """A forward pre-hook. After a graph break a holder may run uncompiled, and what it holds compiled."""
        if torch.compiler.is_dynamo_compiling():
            _check(self)
        elif not _here.originals and self not in _here.running:
            raise PlanError(self._words())

    def at_root(self, module: nn.Module, args: object) -> None:
        """A forward pre-hook of the model itself, which tells it from its parts."""
        self.at_holder(module, args)

    def at_member(self, module: nn.Module, args: object) -> None:
        """A forward pre-hook. By itself, and not as a part of the model, a branch may be called as it is."""
        if torch.compiler.is_dynamo_compiling():
            _check(self)
        elif not _here.originals and (self in _here.running or self._is_within_holder()):
            raise PlanError(self._words())

    def _is_within_holder(self) -> bool:
        """Whether the ``forward`` of a holder is running, which was perhaps called by that name, past all hooks."""
        frame = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount and code.co_name.startswith("forward"):
                owner = frame.f_locals.get(code.co_varnames[0])
                if isinstance(owner, nn.Module) and self._holds(owner):
                    return True
            if frame.f_back is None:
                return False
            frame = frame.f_back
        return False

    def _holds(self, module: nn.Module) -> bool:
        return any(hook in (self.at_root, self.at_holder) for hook in pre_hooks(module).values())

    def over(self, compiled: Call, watching: bool) -> Call:
        """``compiled``, the planned model, as what may run the code that this watches, if it does watch any."""

        def call(*args: object, **kwargs: object) -> object:
            if torch.compiler.is_dynamo_compiling():
                _check(self)
            around = get_eval_frame_callback()
            if around and not _here.running and (_plan_of(around) or self.plan) != self.plan:
                raise PlanError(
                    "torch.compile with a plan was given something that holds a model to which another plan was "
                    "applied: let the one or the other plan say all; fxfuse.apply(model, fxfuse.Plan()) takes the "
                    "groups of the applied one back"
                )
            graphs = _here.graphs
            _here.running.append(self)
            try:
                output = compiled(*args, **kwargs)
            except RuntimeError as error:
                if watching and any(words in str(error) for words in _OTHER_TRACERS):
                    raise PlanError(self._words()) from error
                raise
            finally:
                _here.running.pop()
            if watching and _here.graphs == graphs and not _here.originals:
                raise PlanError(self._words())
            return output

        skip(call)
        call.__wrapped__ = compiled  # type: ignore[attr-defined]  # as functools.wraps does
        return call

    def check(self) -> None:
        """Raise if what is being traced is not the call of the model that the plan is compiled for."""
        if not _here.originals and (_here.running[-1:] != [self] or _traced_for() != self.plan):
            raise NotInForceError(self._words())

    def _words(self) -> str:
        name = flat(self.plan.parallel[0])[0] if self.plan.parallel else self.plan.names[0]
        return (
            f"the plan that fxfuse.apply gave this model (of {name!r}, ...) is not in force where its code runs here. "
            "It holds where the model itself is called: not a part of it or its forward, nor under torch.export, vmap "
            "or grad, another tracer, set_stance or fullgraph=True around it, and not for what was unpickled or "
            "compiled anew since. Call the model that the plan was applied to; apply the plan, with names that fit, to "
            "the module that is called; or take its groups back with fxfuse.apply(model, fxfuse.Plan())"
        )


def without_watches(guards: Sequence[GuardFilterEntry]) -> list[bool]:
    """Which guards of a graph to keep: not those on our own hooks, which cost more per call than all others together.

    What they would notice, ``apply`` does. Where a hook of the user's stands beside ours, all stay.
    """
    dicts = [guard for guard in guards if guard.name.endswith("._forward_pre_hooks") and isinstance(guard.value, dict)]
    ours = tuple(
        guard.name
        for guard in dicts
        if isinstance(guard.value, dict)
        and all(isinstance(getattr(hook, "__self__", None), Watch) for hook in guard.value.values())
    )
    return [not guard.name.startswith(ours) for guard in guards]


_OTHER_TRACERS = ("a dynamo-optimized function", "Cannot access data pointer of Tensor (e.g. FakeTensor")
"""What torch says where a compiled function is called by torch.jit.trace, make_fx or AOTAutograd."""


for _hook in (Watch.at_root, Watch.at_holder, Watch.at_member):
    skip(_hook)  # run by itself, that is in a module that runs uncompiled, it is no code to compile


def watch_of(model: nn.Module) -> Watch | None:
    """What watches over the plan that was applied to ``model`` itself, if one was and it has groups."""
    for hook in pre_hooks(model).values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Watch) and hook == owner.at_root:
            return owner
    return None


def _above(path: str) -> list[str]:
    """The paths of the modules that hold the one at ``path``, the model's own among them."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]


def _computing(member: nn.Module) -> list[nn.Module]:
    """A module and those of its parts that hold weights themselves."""
    return [part for part in member.modules() if part is member or holds_weights(part)]


def _traced_for() -> Plan | None:
    """The plan that what Dynamo traces is compiled with."""
    return _plan_of(traced_with())


def _plan_of(backend: object) -> Plan | None:
    """The plan that a backend was given, whatever wraps it."""
    chosen = chosen_backend(backend)
    if chosen is None or chosen.function.__module__ != "fxfuse.backend.compiler":
        return None
    return edits_of(chosen.options.get("plan"))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch does not annotate it
def _check(watch: Watch) -> bool:
    """Called for real while Dynamo traces."""
    watch.check()
    return True
