"""fxfuse: who reads the residual stream where, in any traced transformer, compiled into wide GEMMs.

The public names are imported when they are first used, so that ``import fxfuse`` stays light.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxfuse.apply import apply
    from fxfuse.calibrate import calibrate
    from fxfuse.errors import FxfuseError, PlanError
    from fxfuse.evaluate import Metrics, evaluate
    from fxfuse.explain import Explanation, explain
    from fxfuse.plan import Plan
    from fxfuse.planning import make_plan
    from fxfuse.prune import prune
    from fxfuse.record import record
    from fxfuse.recording import Recording
    from fxfuse.weights import refresh

_HOME = {
    "apply": "fxfuse.apply",
    "evaluate": "fxfuse.evaluate",
    "calibrate": "fxfuse.calibrate",
    "explain": "fxfuse.explain",
    "Explanation": "fxfuse.explain",
    "FxfuseError": "fxfuse.errors",
    "make_plan": "fxfuse.planning",
    "Metrics": "fxfuse.evaluate",
    "Plan": "fxfuse.plan",
    "PlanError": "fxfuse.errors",
    "prune": "fxfuse.prune",
    "record": "fxfuse.record",
    "Recording": "fxfuse.recording",
    "refresh": "fxfuse.weights",
}

__all__ = [
    "Explanation",
    "FxfuseError",
    "Metrics",
    "Plan",
    "PlanError",
    "Recording",
    "apply",
    "calibrate",
    "evaluate",
    "explain",
    "make_plan",
    "prune",
    "record",
    "refresh",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fxfuse' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


class _Package(ModuleType):
    """Keeps ``fxfuse.prune`` the function: importing a submodule binds it in its package, where it would hide it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
