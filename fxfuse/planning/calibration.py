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

from torch import Tensor, nn

from fxfuse._common.bounds import check_count
from fxfuse._torch.compiled import arguments_of, called, compile_again, original
from fxfuse._torch.dynamo import innermost
from fxfuse.backend.compiler import ffnfuse
from fxfuse.data.batches import eval_mode, is_data, logits_of
from fxfuse.errors import CaptureError, FxfuseError, NotFiniteError, OptionError, RecordError
from fxfuse.measure.divergence import divergence
from fxfuse.measure.recorder import Recorder
from fxfuse.measure.recording import Recording
from fxfuse.model.force import uncompiled
from fxfuse.plan import Plan
from fxfuse.planning import make_plan

log = logging.getLogger(__name__)

_SAME = 1e-4
"""Nats per token within which a repeated call counts as the same call: what rounding in low precision may cost."""


@dataclass
class Calibration:
    """What came of it; ``recording`` and ``plan`` are there when the block has ended.

    Attributes:
        batches: the calls that could be repeated, which the plan was measured on.
        unrecorded: calls that were made and could not be measured: they write to a cache in place, say, or the model
            runs through several graphs in them.
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

    The calls return, and raise, what they always do, more slowly: they run in eval mode, without gradients. What is
    wrong with a recording is said when the block ends. If the block raises, nothing changes.

    Args:
        compiled: ``torch.compile(model, backend="ffnfuse")``, or a model after ``model.compile(backend="ffnfuse")``.
        max_kl: how far, in nats per token, the planned model's next-token distribution may be from the original's, as
            measured on these calls.
        max_tokens: enough; calls after that run as they did before.
        choices: of :func:`fxfuse.make_plan`.

    Raises:
        OptionError: ``compiled`` is not compiled with ffnfuse, follows a plan already, or is being calibrated already.
        CaptureError, RecordError: no call could be recorded, or none repeated (a plan is measured on calls like
            ``model(input_ids=...)``), or what the model computed is NaN.
    """
    check_count("max_tokens", max_tokens)
    seat = _Seat(compiled)
    listener = _Listener(seat, max_tokens)
    found, recorder = listener.found, listener.recorder
    with seat.taken_by(listener):
        yield found
    if listener.problem is not None and (listener.deaf or not recorder.tokens):
        raise listener.problem
    found.recording = recorder.result()
    if not found.batches:
        raise RecordError(
            "none of the calls could be repeated, so no plan could be measured: call the model at least once with "
            "whole sequences, as in model(input_ids=...)"
        )
    found.plan = make_plan(found.recording, seat.model, found.batches, max_kl=max_kl, **choices)  # type: ignore[arg-type]  # checked there
    seat.follow(found.plan)
    log.info("calibrated on %d tokens: %s", recorder.tokens, found.plan.model_dump_json())


class _Listener:
    """Called in the model's place: does what the model does, and records it.

    Attributes:
        problem: the last reason why a call could not be recorded.
        deaf: whether what was recorded is of no use, so that nothing more is.
    """

    def __init__(self, seat: _Seat, max_tokens: int) -> None:
        self._seat, self._max_tokens = seat, max_tokens
        self.recorder = Recorder(seat.model, None, max_group=0)
        self.found = Calibration()
        self.problem: FxfuseError | None = None
        self.deaf = False

    def __call__(self, *args: object, **kwargs: object) -> object:
        if self.deaf or self.recorder.tokens >= self._max_tokens:
            return self._seat.original(*args, **kwargs)
        batch = _by_name(self._seat.model, args, kwargs)
        with eval_mode(self._seat.model):
            try:
                output = self.recorder.run(batch)
            except Exception as error:
                reason = innermost(error)
                if not isinstance(reason, CaptureError):
                    raise  # the model's own
                self._missed(reason)  # before anything has run
                return self._seat.original(*args, **kwargs)
            try:
                self.recorder.measure(self.recorder.batches, batch, output)
            except RecordError as error:
                self._missed(error)
                return output
            repeated = _repeatable(self._seat.model, batch, output)
        if repeated is not None:
            self.found.batches.append(repeated)
        return output

    def _missed(self, problem: FxfuseError) -> None:
        self.problem, self.deaf = problem, isinstance(problem, NotFiniteError)
        self.found.unrecorded += 1


class _Seat:
    """Where a compiled model keeps what is called in its place: an OptimizedModule, or a module compiled in place."""

    def __init__(self, compiled: nn.Module) -> None:
        self._compiled = compiled
        self.model, self._attribute = original(compiled), called(compiled)
        if isinstance(getattr(compiled, self._attribute, None), _Listener):
            raise OptionError("this model is being calibrated already: let that block end before another begins")
        given = arguments_of(compiled)
        if given is None or given["backend"] is not ffnfuse:
            raise OptionError('calibrate takes a model compiled with torch.compile(model, backend="ffnfuse")')
        self._given = {**given, "backend": "ffnfuse"}
        if self._given["options"].get("plan") is not None:
            raise OptionError("this model follows a plan already: calibrate one that was compiled without")

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
        compile_again(self._compiled, **{**self._given, "options": {**self._given["options"], "plan": plan}})


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
    plain = {name: value for name, value in batch.items() if is_data(value)}
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
