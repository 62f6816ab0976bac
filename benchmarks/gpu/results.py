"""Results: rows as lines of JSON while they come, and as CSV and tables in the end."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.gpu.bench import Row
from benchmarks.gpu.models import BASE
from fxfuse._common.files import write_atomically

Cell = str | int | float | bool


def append(path: Path, row: Row) -> None:
    """Write one row, at once."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """All rows that are whole: of a process that was ended, the last one may not be."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def keep(path: Path, rows: Iterable[Row]) -> None:
    """Let the file hold ``rows`` and nothing else."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All rows, with a column for everything that any of them has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def tables(rows: Sequence[Row]) -> str:
    """What a person wants to know, part by part."""
    parts = {"a": _facts, "b": _tests, "c": _micro, "d": _models, "e": _tiles}
    found = [(part, [row for row in rows if row.get("part") == part]) for part in parts]
    texts = [f"{part}\n{parts[part](own)}" for part, own in found if own]
    said = [f"{row['part']}: {row.get(key)}" for row in rows for key in ("cut", "note", "error") if key in row]
    return "\n\n".join([*texts, *said])


def _facts(rows: Sequence[Row]) -> str:
    return "\n".join(f"{key}: {value}" for row in rows for key, value in row.items() if key not in ("part", "what"))


def _tests(rows: Sequence[Row]) -> str:
    outcomes = Counter(str(row["outcome"]) for row in rows if "test" in row)
    failed = [f"  failed: {row['test']}" for row in rows if row.get("outcome") == "failed"]
    return "\n".join([", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()), *failed])


def _micro(rows: Sequence[Row]) -> str:
    """One line for each shape and kernel, beside each other who computed it."""
    point = ("d", "f", "fused", "tokens", "kernel")
    lines: dict[tuple[Cell, ...], dict[str, Row]] = {}
    for row in rows:
        if "us" in row:
            lines.setdefault(tuple(row[key] for key in point), {})[str(row["by"])] = row
    others = list(dict.fromkeys(by for line in lines.values() for by in line if by != "fxfuse"))
    table: list[list[Cell]] = [[*point, "us", "GB/s", "TFLOP/s", "of ceiling", *(f"{by}, us" for by in others)]]
    for key, line in lines.items():
        own = line.get("fxfuse", {})
        facts = [own.get(name, "") for name in ("us", "GB/s", "TFLOP/s", "of ceiling")]
        table.append([*key, *facts, *(line.get(by, {}).get("us", "") for by in others)])
    pairs = [line for line in lines.values() if {"fxfuse", "inductor"} <= line.keys()]
    slower = sum(float(line["fxfuse"]["us"]) > float(line["inductor"]["us"]) for line in pairs)
    return f"{_aligned(table)}\nfxfuse is slower than inductor in {slower} of {len(pairs)}"


def _models(rows: Sequence[Row]) -> str:
    times = {(row["model"], row["phase"], row["column"]): float(row["ms"]) for row in rows if "ms" in row}
    table: list[list[Cell]] = [["model", "phase", "column", "ms", "inductor / it"]]
    for (model, phase, column), ms in times.items():
        base = times.get((model, phase, BASE))
        table.append([model, phase, column, ms, "" if base is None else round(base / ms, 3)])
    return _aligned(table)


def _tiles(rows: Sequence[Row]) -> str:
    shapes = [row for row in rows if "best" in row]
    names = ("kernel", "tokens", "N", "K", "picked", "picked us", "picked modelled us", "best", "best us")
    table: list[list[Cell]] = [[*names], *([row[name] for name in names] for row in shapes)]
    wins = Counter(str(row["best row"]) for row in shapes)
    return "\n".join([_aligned(table), "rows by how often they are the fastest:", *_counted(wins)])


def _counted(wins: Counter[str]) -> list[str]:
    return [f"{count:4} {line}" for line, count in wins.most_common()]


def _aligned(table: Sequence[Sequence[Cell]]) -> str:
    cells = [[str(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)
