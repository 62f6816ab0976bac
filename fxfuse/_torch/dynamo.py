"""Dynamo from outside: its settings, its errors, its records. Seen on torch 2.11.0 and 2.13.0."""

from __future__ import annotations

import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._C._dynamo.eval_frame import get_eval_frame_callback as get_eval_frame_callback
from torch._dynamo import trace_rules
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.convert_frame import input_codes
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._dynamo.exc import Unsupported as Unsupported
from torch._dynamo.types import GuardFilterEntry as GuardFilterEntry
from torch._dynamo.utils import counters
from torch._logging._internal import trace_structured
from torch.torch_version import TorchVersion

# Unsupported: only its subclasses make Dynamo break a graph. GuardFilterEntry: what torch.compile's public option
# guard_filter_fn is given. get_eval_frame_callback: the compiled call that is running, if there is one, which nothing
# public tells; a function of C, as Dynamo would compile one of ours.

GUARDS_SEE_STRIDES = TorchVersion(torch.__version__) >= "2.13"
"""Whether a parameter that gets other strides makes Dynamo compile anew. It did not in 2.11.0, and does in 2.13.0."""

_LIMIT = 64
"""Recompilations of one frame: generous enough for a ``generate`` of mixed lengths, which takes about 8 graphs."""


def innermost(error: BaseException) -> BaseException:
    """What went wrong: Dynamo wraps it, and says less with each wrapping. The wrappers are private classes."""
    while isinstance(error, TorchDynamoException) and (inner := error.__cause__ or error.__context__):
        error = inner
    return error


@contextmanager
def raising(kind: type[Exception]) -> Iterator[None]:
    """Raise what a backend raised itself, if it is of ``kind``: Dynamo wraps that into a private class."""
    try:
        yield
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, kind):
            raise error.inner_exception from error
        raise


def is_off() -> bool:
    """Whether ``torch.compile`` compiles nothing: TORCH_COMPILE_DISABLE is set, or the switch behind it."""
    return bool(torch._dynamo.config.disable)


def never_original() -> None:
    """Let Dynamo raise where it would run the original code: past its limit, and after an error it is to suppress.

    No public API sets any of these for the whole process.
    """
    config = torch._dynamo.config
    config.suppress_errors = False
    config.recompile_limit = max(config.recompile_limit, _LIMIT)
    config.fail_on_recompile_limit_hit = True


def originals_forbidden() -> AbstractContextManager[None]:
    """The same inside a block only: each kind of call is traced, whatever their number."""
    config: AbstractContextManager[None] = torch._dynamo.config.patch(
        suppress_errors=False, recompile_limit=_LIMIT, fail_on_recompile_limit_hit=True
    )
    return config


def whole_under_ddp() -> AbstractContextManager[None]:
    """Inside, DDP cuts no graph at the borders of its buckets, which would part the members of a group."""
    config: AbstractContextManager[None] = torch._dynamo.config.patch(optimize_ddp=False)
    return config


def backend_named(name: str) -> Callable[..., Callable[..., object]]:
    """The backend that is registered under ``name``; the public API tells the names alone."""
    return lookup_backend(name)


def skips(function: Callable[..., object]) -> bool:
    """Whether Dynamo would not trace a frame of ``function`` because of where it comes from; nothing public tells."""
    return bool(trace_rules.check(function))


def skip(function: Callable[..., object]) -> None:
    """Never compile a frame of ``function``, but trace it where another calls it.

    ``torch.compiler.disable`` would break the graph of who calls it.
    """
    assert isinstance(function, types.FunctionType)
    skip_code(function.__code__)


def set_aside(backend: Callable[..., object]) -> None:
    """Let what was compiled with ``backend`` count towards no frame's ``recompile_limit``, from now on.

    ``isolate_recompiles`` does so where torch has it. In torch 2.11.0 what a frame was compiled for counts whoever
    compiled it, but for what was made for other modules: so these are said to be made for a module that nobody has.
    """
    for code in [seen() for seen in input_codes.seen]:
        for entry in [] if code is None else _debug_get_cache_entry_list(code):
            if getattr(entry.backend, "compiler_fn", None) is backend:
                entry.guard_manager.id_matched_objs = {"": weakref.ref(_NOBODY)}


class _Nobody:
    """What no frame has for a local variable."""


_NOBODY = _Nobody()


def graph_breaks() -> Counter[str]:
    """How often a graph was broken for which reason; ``torch._dynamo.explain`` would trace the model again."""
    return Counter(counters["graph_break"])


def page(name: str, text: str) -> None:
    """Give the graph that is compiled a page in tlparse, which has no public way to take one."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)
