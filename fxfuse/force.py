"""In force: the code of a model to which a plan was applied runs as the plan has it, or not at all.

What ``fxfuse.apply`` compiles stands in ``model.__call__``, and much goes past that: a torch.compile of what holds the
model (Dynamo inlines the original code), torch.export, vmap, ``set_stance``, a call of a part of the model. So each
module that a group moves has a hook, which asks, whenever its code runs or is traced, who is asking.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.exc import TorchDynamoException, Unsupported
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.utils.hooks import RemovableHandle

from fxfuse.errors import PlanError
from fxfuse.graph.values import clean
from fxfuse.options import Options
from fxfuse.plan import Plan, flat

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
    compiled = vars(model).pop("_compiled_call_impl", None)
    _here.originals += 1
    try:
        yield
    finally:
        _here.originals -= 1
        if compiled is not None:
            model._compiled_call_impl = compiled


def told(graph: Call) -> Call:
    """A compiled graph that follows a plan, and tells so when it runs."""

    def run(*args: object) -> object:
        _here.graphs += 1
        return graph(*args)

    return run


class Watch:
    """Sees to it that ``plan`` is in force wherever the code that it regroups runs.

    One object serves all modules of a model; copied and pickled with them, it is one object again.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def put(self, model: nn.Module) -> list[RemovableHandle]:
        """Hook this into ``model`` and into its modules that the plan regroups: into what runs even if only a part is
        called, as when a layer computes a branch without calling the module that is named."""
        modules = {clean(name): module for name, module in model.named_modules(remove_duplicate=False)}
        handles = [model.register_forward_pre_hook(self.at_root, prepend=True)]
        members = [modules[name] for group in self.plan.parallel for name in flat(group) if name in modules]
        for member in dict.fromkeys(part for member in members for part in _computing(member)):
            if member is not model:
                handles.append(member.register_forward_pre_hook(self.at_member, prepend=True))
        return handles

    def at_member(self, module: nn.Module, args: object) -> None:
        """A forward pre-hook."""
        if torch.compiler.is_dynamo_compiling():
            _check(self)
        elif not _here.originals:
            raise PlanError(self._words())

    def at_root(self, module: nn.Module, args: object) -> None:
        """A forward pre-hook of the model. After a graph break its frame may run uncompiled, and its parts compiled."""
        if torch.compiler.is_dynamo_compiling():
            _check(self)
        elif not _here.originals and self not in _here.running:
            raise PlanError(self._words())

    def over(self, compiled: Call) -> Call:
        """``compiled``, the planned model, as what may run the code that this watches."""

        def call(*args: object, **kwargs: object) -> object:
            if torch.compiler.is_dynamo_compiling():
                _check(self)
            graphs = _here.graphs
            _here.running.append(self)
            try:
                output = compiled(*args, **kwargs)
            except RuntimeError as error:
                if "dynamo-optimized function" in str(error):  # torch.jit.trace and make_fx
                    raise PlanError(self._words()) from error
                raise
            finally:
                _here.running.pop()
            if _here.graphs == graphs and not _here.originals:
                raise PlanError(self._words())
            return output

        skip_code(call.__code__)
        call.__wrapped__ = compiled  # type: ignore[attr-defined]  # as functools.wraps does
        return call

    def check(self) -> None:
        """Raise if what is being traced is not the call of the model that the plan is compiled for."""
        if _here.originals or (_here.running[-1:] == [self] and _traced_for() == self.plan):
            return
        other = _traced_for()
        if other and other != self.plan and not _here.running:
            raise _Refused(
                "a plan is applied to this model, and it is compiled with another one as a part of something else: "
                "give torch.compile no plan, or fxfuse.apply(model, fxfuse.Plan()) first"
            )
        raise NotInForceError(self._words())

    def _words(self) -> str:
        name = flat(self.plan.parallel[0])[0] if self.plan.parallel else self.plan.drop[0]
        return (
            f"the plan that fxfuse.apply gave this model (of {name!r}, ...) is not in force where its code runs here. It "
            "holds where the model itself is called: not a part of it or its forward, nor under torch.export, vmap or "
            "grad, another tracer, set_stance or fullgraph=True around it, and not for what was unpickled or "
            "compiled anew since. Call the model that the plan was applied to; apply the plan, with names that fit, to "
            "the module that is called; or take its groups back with fxfuse.apply(model, fxfuse.Plan())"
        )


class _Refused(PlanError, TorchDynamoException):
    """What Dynamo must neither compile nor run."""


for _hook in (Watch.at_member, Watch.at_root):
    skip_code(_hook.__code__)  # run by itself, that is in a module that runs uncompiled, it is no code to compile


def watch_of(model: nn.Module) -> Watch | None:
    """What watches over the plan that was applied to ``model`` itself, if one was and it has groups."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Watch)), None)


def unwatch(model: nn.Module, watch: Watch) -> None:
    """Take all hooks of ``watch`` out."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is watch]:
            del hooks[key]


def _computing(member: nn.Module) -> Iterator[nn.Module]:
    """A module and those of its parts that hold weights themselves."""
    yield member
    for part in member.modules():
        if part._parameters or part._buffers:
            yield part


def _traced_for() -> Plan | None:
    """The plan that what Dynamo traces is compiled with."""
    backend: object = InstructionTranslator.current_tx().output.compiler_fn
    while inner := _inner(backend):
        backend = inner
    if not isinstance(backend, torch._TorchCompileWrapper) or backend.compiler_fn.__module__ != "fxfuse.backend":
        return None
    return Options.parse(backend.kwargs.get("options") or {}).edits


def _inner(backend: object) -> object:
    """What a backend wraps: Dynamo's own wrappers, and DDP's, which cuts graphs at the borders of its buckets."""
    owner = getattr(backend, "__self__", None)
    if isinstance(owner, DDPOptimizer):
        return owner.backend_compile_fn
    return getattr(backend, "_torchdynamo_orig_backend", None)


@torch._dynamo.assume_constant_result
def _check(watch: Watch) -> bool:
    """Called for real while Dynamo traces."""
    watch.check()
    return True
