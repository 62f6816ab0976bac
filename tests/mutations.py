"""Do the tests notice? Break the library in known ways, one at a time, and see the suite go red.

    python tests/mutations.py            # every mutation; exits 1 if one survives
    python tests/mutations.py scale norm # those whose names contain one of the words

Each mutation is a textual edit of a copy of the package; mutations.toml holds them. One whose text is no longer there
is an error, so that the list cannot rot unnoticed. As many run at once as there are cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """Replace ``old`` by ``new``, once, in ``file``; ``tests`` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def check(self) -> None:
        """See that the text is there."""
        if (ROOT / self.file).read_text().count(self.old) != 1:
            raise SystemExit(f"{self.name}: {self.file} no longer has its text once; bring mutations.toml up to date")


def survives(mutation: Mutation) -> bool:
    """Whether the tests stay green with the mutation in place."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("fxfuse", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / mutation.file
        file.write_text(file.read_text().replace(mutation.old, mutation.new))
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, *mutation.tests]
        own = {"PYTHONPATH": str(copy), "CI": "1", "HYPOTHESIS_PROFILE": "mutants", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, env=os.environ | own, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{mutation.name}: the tests could not run\n{done.stdout}\n{done.stderr}")
        where = next((line for line in done.stdout.splitlines() if line.startswith("FAILED")), "").split(" - ")[0]
        print(f"{'SURVIVES' if done.returncode == 0 else 'caught  '}  {mutation.name}  {where}", flush=True)
        return done.returncode == 0


def mutations() -> list[Mutation]:
    """All of them, each with its text where it is to be."""
    found = tomllib.loads((ROOT / "tests/mutations.toml").read_text())["mutation"]
    made = [Mutation(**{**each, "tests": tuple(each["tests"])}) for each in found]
    for each in made:
        each.check()
    return made


def main(words: list[str]) -> int:
    chosen = [each for each in mutations() if not words or any(word in each.name for word in words)]
    with ThreadPoolExecutor(os.cpu_count()) as several:
        return 1 if any(list(several.map(survives, chosen))) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
