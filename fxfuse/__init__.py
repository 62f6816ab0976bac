"""fxfuse: who reads the residual stream where, in any traced transformer, compiled into wide GEMMs.

The public names are imported when they are first used, so that ``import fxfuse`` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxfuse.backend.applying import apply
    from fxfuse.errors import FxfuseError, PlanError
    from fxfuse.exporting.export import export
    from fxfuse.healing.heal import Healing, heal
    from fxfuse.measure.evaluation import Metrics, evaluate
    from fxfuse.measure.recorder import record
    from fxfuse.measure.recording import Recording
    from fxfuse.measure.units import narrowed
    from fxfuse.model.pruning import prune
    from fxfuse.packing.calls import refresh
    from fxfuse.plan import Plan
    from fxfuse.planning import make_plan
    from fxfuse.planning.calibration import calibrate
    from fxfuse.report.explanation import Explanation, explain

_HOME = {
    "apply": "fxfuse.backend.applying",
    "calibrate": "fxfuse.planning.calibration",
    "evaluate": "fxfuse.measure.evaluation",
    "explain": "fxfuse.report.explanation",
    "Explanation": "fxfuse.report.explanation",
    "export": "fxfuse.exporting.export",
    "fold_gains": "fxfuse.backend.folding",
    "FxfuseError": "fxfuse.errors",
    "heal": "fxfuse.healing.heal",
    "Healing": "fxfuse.healing.heal",
    "make_plan": "fxfuse.planning",
    "Metrics": "fxfuse.measure.evaluation",
    "narrowed": "fxfuse.measure.units",
    "Plan": "fxfuse.plan",
    "PlanError": "fxfuse.errors",
    "prune": "fxfuse.model.pruning",
    "record": "fxfuse.measure.recorder",
    "Recording": "fxfuse.measure.recording",
    "refresh": "fxfuse.packing.calls",
}

__all__ = [
    "Explanation",
    "FxfuseError",
    "Healing",
    "Metrics",
    "Plan",
    "PlanError",
    "Recording",
    "apply",
    "calibrate",
    "evaluate",
    "explain",
    "export",
    "fold_gains",
    "heal",
    "make_plan",
    "narrowed",
    "prune",
    "record",
    "refresh",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fxfuse' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
