"""Calibrate: let a compiled model be used as it is, learn from that what to fuse, and go on with the plan.

Everything that torch.compile has made of the model until then was made without a plan. All graphs of a model follow one
plan, so the plan comes into force for all of them at one moment: when the ``with`` block ends.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxfuse.backend import ffnfuse
from fxfuse.batches import eval_mode, logits_of
from fxfuse.capture import uncompiled
from fxfuse.errors import CaptureError, OptionError, RecordError
from fxfuse.plan import Plan
from fxfuse.planning import make_plan
from fxfuse.record import Recorder, divergence
from fxfuse.recording import Recording

log = logging.getLogger(__name__)

_SAME = 1e-4
"""Nats per token within which a repeated call counts as the same call: what rounding in low precision may cost."""


@dataclass
class Calibration:
    """What came of it; ``recording`` and ``plan`` are there when the block has ended.

    Attributes:
        batches: the calls that could be repeated, which the plan was measured on.
        unrecorded: calls that were made and could not be measured, because they write to a cache in place.
    """

    recording: Recording | None = None
    plan: Plan | None = None
    batches: list[dict[str, object]] = field(default_factory=list)
    unrecorded: int = 0


@contextmanager
def calibrate(
    compiled: nn.Module,
    *,
    max_kl: float = 0.02,
    max_tokens: int = 4096,
    **choices: object,
) -> Iterator[Calibration]:
    """Record the calls of ``compiled`` inside the block; when it ends, make one plan and let the model follow it.

    The calls return what they always return, more slowly: they run in eval mode, without gradients. If the block
    raises, nothing changes.

    Args:
        compiled: ``torch.compile(model, backend="ffnfuse")``, or a model after ``model.compile(backend="ffnfuse")``.
        max_kl: how far, in nats per token, the planned model's next-token distribution may be from the original's, as
            measured on these calls.
        max_tokens: enough; calls after that run as they did before.
        choices: of :func:`fxfuse.make_plan`.

    Raises:
        OptionError: ``compiled`` is not compiled with ffnfuse, or follows a plan already.
        RecordError: no call could be recorded, or none repeated (a plan is measured on calls like
            ``model(input_ids=...)``).
    """
    seat = _Seat(compiled)
    recorder = Recorder(seat.model, None, max_group=0)
    found = Calibration()
    problem: CaptureError | None = None

    def instead(*args: object, **kwargs: object) -> object:
        nonlocal problem
        if recorder.tokens >= max_tokens:
            return seat.original(*args, **kwargs)
        batch = _by_name(seat.model, args, kwargs)
        with eval_mode(seat.model):
            try:
                output = recorder(recorder.batches, batch)
            except CaptureError as error:  # raised before anything has run
                problem = error
                found.unrecorded += 1
                return seat.original(*args, **kwargs)
            repeated = _repeatable(seat.model, batch, output)
        if repeated is not None:
            found.batches.append(repeated)
        return output

    with seat.taken_by(instead):
        yield found
    if problem is not None and not recorder.tokens:
        raise problem
    found.recording = recorder.result()
    if not found.batches:
        raise RecordError(
            "none of the calls could be repeated, so no plan could be measured: call the model at least once with "
            "whole sequences, as in model(input_ids=...)"
        )
    found.plan = make_plan(found.recording, seat.model, found.batches, max_kl=max_kl, **choices)  # type: ignore[arg-type]  # checked there
    seat.follow(found.plan)
    log.info("calibrated on %d tokens: %s", recorder.tokens, found.plan.model_dump_json())


class _Seat:
    """Where a compiled model keeps what is called in its place: an OptimizedModule, or a module compiled in place."""

    def __init__(self, compiled: nn.Module) -> None:
        self._compiled = compiled
        if isinstance(compiled, torch._dynamo.OptimizedModule):
            self.model: nn.Module = compiled._orig_mod
            callback: object = getattr(compiled.dynamo_ctx, "callback", None)
        else:
            self.model = compiled
            call = getattr(compiled, "_compiled_call_impl", None)
            callback = None if call is None else inspect.getclosurevars(call).nonlocals.get("callback")
        while hasattr(callback, "_torchdynamo_orig_backend"):
            callback = callback._torchdynamo_orig_backend
        if not isinstance(callback, torch._TorchCompileWrapper) or callback.compiler_fn is not ffnfuse:
            raise OptionError('calibrate takes a model compiled with torch.compile(model, backend="ffnfuse")')
        self._wrapper = callback
        if self._options.get("plan") is not None:
            raise OptionError("this model follows a plan already: calibrate one that was compiled without")

    @property
    def _options(self) -> Mapping[str, object]:
        options: Mapping[str, object] = self._wrapper.kwargs.get("options") or {}
        return options

    @property
    def _attribute(self) -> str:
        return "forward" if self._compiled is not self.model else "_compiled_call_impl"

    @contextmanager
    def taken_by(self, instead: Callable[..., object]) -> Iterator[None]:
        self.original: Callable[..., object] = getattr(self._compiled, self._attribute)
        setattr(self._compiled, self._attribute, instead)
        try:
            yield
        finally:
            setattr(self._compiled, self._attribute, self.original)

    def follow(self, plan: Plan) -> None:
        """Compile anew, with ``plan``; graphs made without it serve no longer."""
        given = {**self._wrapper.kwargs, "options": {**self._options, "plan": plan}}
        if isinstance(self._compiled, torch._dynamo.OptimizedModule):
            fresh: object = torch.compile(self.model, backend="ffnfuse", dynamic=self._wrapper.dynamic, **given)
            assert isinstance(fresh, torch._dynamo.OptimizedModule)
            self._compiled.dynamo_ctx = fresh.dynamo_ctx
            self._compiled._initialize()
        else:
            self._compiled.compile(backend="ffnfuse", dynamic=self._wrapper.dynamic, **given)


def _by_name(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, object]:
    """The arguments of a call, by keyword."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _repeatable(model: nn.Module, batch: Mapping[str, object], output: object) -> dict[str, object] | None:
    """The call without what holds state (a KV cache), if it still returns the same logits; None if it does not.

    ``generate`` asks for the logits of the last position only. Then the tokens alone, and perhaps their mask, make a
    call that returns all of them.
    """
    logits, ids = logits_of(output), batch.get("input_ids")
    if logits is None or not isinstance(ids, Tensor):
        return None
    plain = {name: value for name, value in batch.items() if all(map(_is_data, tree_leaves(value)))}
    tokens: dict[str, object] = {name: plain[name] for name in ("input_ids", "attention_mask") if name in plain}
    for call in (plain, tokens):
        with uncompiled(model):
            try:
                again = logits_of(model(**call))
            except Exception:  # whatever a model says of a call that lacks what it was given
                continue
        if again is not None and again.shape[:-1] == ids.shape and _agree(logits, again[:, -logits.shape[1] :]):
            return call
    return None


def _agree(logits: Tensor, again: Tensor) -> bool:
    if logits.shape != again.shape:
        return False
    return float(divergence(logits.flatten(0, -2), again.flatten(0, -2)).mean()) < _SAME


def _is_data(value: object) -> bool:
    return value is None or isinstance(value, Tensor | bool | int | float | str)
