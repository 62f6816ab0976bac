"""All parts in turn, each in a process of its own with its share of the time."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from benchmarks.gpu import correctness, machine, micro, models, results, tiles
from benchmarks.gpu.bench import REHEARSED, Bench, Card, Emit, Row
from benchmarks.gpu.children import asked, ended, started


@dataclass(frozen=True)
class Part:
    """A part, and its share of the time: seconds, of 8 minutes for all."""

    run: Callable[[Bench, Emit], None]
    share: float


PARTS: Mapping[str, Part] = {
    "a": Part(machine.run, 20),
    "b": Part(correctness.run, 105),
    "c": Part(micro.run, 95),
    "d": Part(models.run, 165),
    "e": Part(tiles.run, 75),
}
GRACE = 5.0
"""Seconds that a part has to end by itself."""


def run(out: Path, chosen: Sequence[str], minutes: float, rehearsed: bool) -> bool:
    """Run the chosen parts and say what they found; whether all went well.

    Results of other parts that the folder has of the same card are kept.

    Raises:
        SystemExit: there is no GPU, and it is no rehearsal.
    """
    card = REHEARSED if rehearsed else asked(Card.here, 60)
    if card is None:
        raise SystemExit("there is no GPU here; make gpu ARGS=--rehearse tries the code without one")
    out.mkdir(parents=True, exist_ok=True)
    lines = out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.gpu.name.lower())}.jsonl"
    results.keep(lines, [row for row in results.read(lines) if row.get("part") not in chosen])
    whole, end = sum(PARTS[key].share for key in chosen), time.monotonic()
    for key in chosen:
        end += minutes * 60 * PARTS[key].share / whole
        _part(key, lines, Bench(card, end - GRACE, tuple(results.read(lines))))
    rows = results.read(lines)
    results.write_csv(lines.with_suffix(".csv"), rows)
    print(results.tables(rows), f"results: {lines}", sep="\n\n", flush=True)
    return not any("error" in row for row in rows if row.get("part") in chosen)


def _part(key: str, lines: Path, bench: Bench) -> None:
    """One part, ended when its time is over."""
    emit = partial(_emit, key, lines)
    begin = time.monotonic()
    emit({"begun": datetime.now(UTC).isoformat(timespec="seconds"), "limit s": round(bench.left + GRACE)})
    process = started(_run, PARTS[key].run, bench, emit)
    if not ended(process, bench.left + GRACE):
        emit({"error": f"ended after {time.monotonic() - begin:.0f} s, its limit: what is missing was not done"})
    elif process.exitcode:
        emit({"error": f"its process ended with {process.exitcode}"})


def _run(part: Callable[[Bench, Emit], None], bench: Bench, emit: Emit) -> None:
    try:
        part(bench, emit)
    except Exception as error:
        emit({"error": f"{type(error).__name__}: {error}"[:600], "trace": traceback.format_exc()[-1500:]})


def _emit(part: str, lines: Path, row: Row) -> None:
    results.append(lines, {"part": part, **row})
    print(part, *(f"{key}={str(value)[:60]}" for key, value in row.items()), flush=True)
