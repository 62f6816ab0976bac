"""Which hidden units of an FFN to keep: those of largest mean ``|activation| * ||down column||``.

Source: the channel ranking of Puzzle (arXiv 2411.19146). A unit contributes its activation times its column of the down
projection, so this is how long a unit's contribution is on the average.
"""

from __future__ import annotations

import math

import torch

from fxfuse._common.units import Units
from fxfuse.errors import OptionError, PlanError
from fxfuse.measure.recording import Recording


def narrowed(recording: Recording, name: str, keep: float) -> Units:
    """The units that a narrowed FFN keeps, for ``Plan(narrow={name: ...})``.

    Args:
        recording: of the model.
        name: of the FFN. If the recorded plan has narrowed it already, the units are some of those that it kept.
        keep: how many, or which share of them if it is a fraction below 1; at least one. Units that are as good keep
            their order.

    Raises:
        PlanError: no branch has the name, or it is no FFN that tells its hidden units.
        OptionError: ``keep`` is no such number.
        RecordError: the recording was made before units were recorded.
    """
    width = recording.branches[recording.index(name)].width
    if not width:
        raise PlanError(f"{name!r} is no FFN whose hidden units are told apart: it cannot be narrowed")
    count = math.ceil(keep * width) if isinstance(keep, float) and 0 < keep < 1 else keep
    if isinstance(count, bool) or count != int(count) or not 1 <= count <= width:
        raise OptionError(f"keep is a number of units, 1 to {width}, or a share of them between 0 and 1, not {keep!r}")
    order = torch.argsort(recording.units_of(name), descending=True, stable=True)
    chosen = sorted(order[: int(count)].tolist())
    held = recording.plan.narrow.get(name, range(width))
    return tuple(held[unit] for unit in chosen)
