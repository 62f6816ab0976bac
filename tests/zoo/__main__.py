"""``python -m tests.zoo``: check every net, each in a process of its own, and write docs/architectures.md.

What has been checked stays in ``.zoo/results.jsonl``, a line each, until the sources of the library or of the zoo
change; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tests.zoo.apart import check_apart
from tests.zoo.check import Result, from_dict
from tests.zoo.nets import entries
from tests.zoo.page import page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".zoo" / "results.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description="Check every architecture.")
    parser.add_argument("names", nargs="*", help="check these again, and write no page; none: all that are not yet")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--keep", action="store_true", help="keep what older sources gave")
    chosen = parser.parse_args(arguments)
    catalogue, digest = entries(), _digest()
    if unknown := set(chosen.names) - set(catalogue):
        parser.error(f"no such net: {', '.join(sorted(unknown))}")
    kept = [] if chosen.names else _read(digest, chosen.keep)
    done = {r.name: r for r in kept if r.name in catalogue or r.origin == "timm"}  # which is not everywhere
    todo = [entry for name, entry in catalogue.items() if name not in done and name in (chosen.names or catalogue)]
    console = Console()
    with ThreadPoolExecutor(chosen.jobs) as pool, Progress(console=console) as progress:
        task = progress.add_task("zoo", total=len(todo))
        for future in as_completed([pool.submit(check_apart, entry) for entry in todo]):
            result = future.result()
            _append(result, digest)
            done[result.name] = result
            progress.update(task, advance=1, description=result.name)
            if result.failed or not result.exact:
                console.print(f"{result.name}: {result.failed or 'NOT EXACT'}", markup=False, highlight=False)
    ordered = [done[name] for name in dict.fromkeys([*catalogue, *done]) if name in done]
    if not chosen.names:
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "architectures.md").write_text(page(ordered))
    return any(result.built and not result.exact for result in ordered)


def _digest() -> str:
    """Of the sources that the results depend on."""
    sources: Iterable[Path] = [*(ROOT / "fxfuse").rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]


def _read(digest: str, keep: bool) -> Iterable[Result]:
    if not RESULTS.exists():
        return []
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return [from_dict(line["result"]) for line in lines if keep or line["digest"] == digest]


def _append(result: Result, digest: str) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps({"digest": digest, "time": time.time(), "result": result.to_dict()}) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
