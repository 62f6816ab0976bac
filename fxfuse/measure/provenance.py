"""When and by what a measurement was made."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch


def provenance() -> dict[str, str]:
    """The day in UTC as ``date``, and the versions of ``fxfuse`` and ``torch``.

    Not the hour: equal recordings of one day are equal files.
    """
    try:
        own = version("fxfuse")
    except PackageNotFoundError:  # run from a checkout that nobody installed
        own = "of an unknown version"
    return {"date": datetime.now(UTC).date().isoformat(), "fxfuse": own, "torch": torch.__version__}
