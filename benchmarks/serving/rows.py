"""The rows of the benchmark, in a file that it goes on with after an interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxfuse._common.files import write_atomically
from fxfuse.bench.engines.contest import Contest
from fxfuse.bench.timing import ORIGINAL


class Rows:
    """Rows by what they are of: kind, mode and batch. Those that ``path`` has are there already.

    Args:
        path: a JSON file, which is written after each contest; None to keep them in memory alone.
        settings: what all rows of one file have in common.

    Raises:
        SystemExit: the rows in ``path`` were measured with other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path, self._held = path, {"settings": json.loads(json.dumps(settings)), "refused": {}, "rows": []}
        if path is not None and path.exists():
            held = json.loads(path.read_text())
            if held.get("settings") != self._held["settings"]:
                raise SystemExit(f"{path} has rows of other settings: name another file, or take it away")
            self._held = held

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self._held["rows"]

    def has(self, kind: str, mode: str, batch: int) -> bool:
        return any((row["kind"], row["mode"], row["batch"]) == (kind, mode, batch) for row in self.rows)

    def refuse(self, kind: str, plan: str, reason: str) -> None:
        """Keep why a kind cannot say a plan: there is no row of it."""
        self._held["refused"].setdefault(kind, {})[plan] = reason
        self._write()

    def add(self, kind: str, mode: str, done: Contest, machine: str, note: str) -> None:
        for phase, samples in done.phases.items():
            self.rows.append(
                {
                    "kind": kind,
                    "mode": mode,
                    "batch": done.requests.batch,
                    "stretches": done.requests.stretches,
                    "what": phase,
                    "void": phase in done.void,
                    "ms": {name: 1e3 * samples.median(name) for name in samples.seconds},
                    "to original": {name: samples.ratio(name, ORIGINAL) for name in samples.seconds},
                    "seconds": dict(samples.seconds),
                    "engines": dict(done.descriptions),
                    "machine": machine,
                    "note": note,
                }
            )
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            write_atomically(self._path, (json.dumps(self._held, indent=2) + "\n").encode())

    def table(self) -> str:
        """The rows as Markdown."""
        lines = [
            "| computed by | mode | batch | | model | ms | of the original | |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            where = f"{row['kind']} | {row['mode']} | {row['batch']} | {row['what']}"
            void = "void" if row["void"] else ""
            for name, ms in row["ms"].items():
                lines.append(f"| {where} | {name} | {ms:.1f} | {row['to original'][name]:.3f} | {void} |")
        return "\n".join(lines)
