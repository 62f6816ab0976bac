"""The results of a search for plans: what each candidate costs and gains, as a JSON file that any search can write.

A list of objects, one a candidate::

    [{"name": "drop 7, 25", "solver": "milp", "latency": 0.0371, "kl": 0.081, "healed_kl": 0.043, "chosen": true}]
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fxfuse.errors import ReportError


class Result(BaseModel):
    """One candidate of a search.

    Attributes:
        name: what the page calls it.
        solver: what proposed it; candidates of one solver are drawn alike.
        latency: seconds, of one call of whatever the search has timed.
        kl: KL(original || planned), nats per token, before healing.
        healed_kl: the same after healing; None if it was not healed.
        chosen: whether the search has chosen it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1)
    solver: str = Field(min_length=1)
    latency: float = Field(gt=0, allow_inf_nan=False)
    kl: float = Field(ge=-1e-6, allow_inf_nan=False)  # rounding makes a little less than 0 of an exact plan's
    healed_kl: float | None = Field(default=None, ge=-1e-6, allow_inf_nan=False)
    chosen: bool = False

    @property
    def best_kl(self) -> float:
        """KL in nats per token: after healing, if it was healed."""
        return self.kl if self.healed_kl is None else self.healed_kl


_LIST = TypeAdapter(tuple[Result, ...])


def load_results(path: str | os.PathLike[str]) -> tuple[Result, ...]:
    """Read a file of results.

    Raises:
        ReportError: no such file, not JSON, or an entry that is no candidate; the message names it.
    """
    shown = repr(os.fspath(path))
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ReportError(f"results {shown} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"results {shown} are not JSON ({error}); were they cut short?") from error
    try:
        return _LIST.validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        raise ReportError(
            f"results {shown}{where and ', entry ' + where}: {first['msg']}, got {str(first['input'])[:80]!r}; "
            "a list of {name, solver, latency, kl, healed_kl, chosen} is wanted"
        ) from error


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (latency, KL) pairs that no other beats in both, fastest first."""
    best: list[tuple[float, float]] = []
    for latency, kl in sorted(points):
        if not best or kl < best[-1][1]:
            best.append((latency, kl))
    return best
