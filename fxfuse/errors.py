"""Every error that fxfuse raises on purpose. Each message says what is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxfuseError(Exception):
    """Base of all errors of this library: ``except FxfuseError`` catches what is the input's fault."""


class PlanError(FxfuseError):
    """A plan that is malformed, or that cannot be applied to this graph; the message names the entry at fault."""


class OptionError(FxfuseError):
    """An unknown backend option, or a value that it cannot take."""


class CaptureError(FxfuseError):
    """The model could not be traced, or nothing was traced."""


class RecordError(FxfuseError):
    """Nothing could be recorded or evaluated, or what a model computed is no number; or a recording does not fit."""


class NotFiniteError(RecordError):
    """What a model computed is NaN or infinite."""


class VerifyError(FxfuseError):
    """A rewrite that should be exact is not, on the example inputs: a mistake of this library's."""


class PruneError(FxfuseError):
    """A branch that was dropped or made linear cannot leave the model."""


class HealError(FxfuseError):
    """A model could not be healed: too little text, or nothing in it that can be fitted."""


class ExportError(FxfuseError):
    """A planned model cannot be written: the format cannot say it, or the folder cannot be written to."""


class EngineError(FxfuseError):
    """An engine cannot be started, does not load a model, or has ended."""


class LoadError(FxfuseError):
    """A model could not be loaded from what was given."""


class ReportError(FxfuseError):
    """Results of a search that cannot be read, or are none."""


class KernelError(FxfuseError):
    """A kernel was asked for what it cannot compute: shapes that do not fit, a dtype or a GPU it does not know."""


class MissingDependencyError(FxfuseError):
    """An optional package is needed; the message names the command that installs it."""


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """The names most like ``name``, or else some that there are, as the end of an error message."""
    names = sorted(set(known))
    if near := alike(name, names, limit):
        return f"; nearest: {', '.join(near)}"
    some = [*names[:limit], "..."] if len(names) > limit else names
    return f"; there are: {', '.join(some)}" if some else ""


def alike(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The names most like ``name``: first the same place seen from deeper or from further out, then the same spelling.

    A submodule compiled by itself calls ``mlp`` what its model calls ``model.layers.3.mlp``.
    """
    names = sorted(set(known))
    same = [each for each in names if f".{name}".endswith(f".{each}") or f".{each}".endswith(f".{name}")]
    return same[:limit] or difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
