"""Part b: `tests/gpu`, on several cores at once where there are some: most of the time goes into compiling kernels.

A rehearsal runs each test with the first of its parameters; `tests/kernels/interpreted` has all of them.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu.bench import Bench, Emit

ROOT = Path(__file__).parents[2]
WORKERS = 8


def run(bench: Bench, emit: Emit) -> None:
    """One row for each test; one that fails, or that no test was run, is an error."""
    workers = min(WORKERS, (os.cpu_count() or 1) // 2)
    several = not bench.rehearsed and workers > 1 and find_spec("xdist") is not None
    spread = ["-n", str(workers), "--dist", "worksteal"] if several else []
    arguments = ["-q", "-p", "no:cacheprovider", "--tb=short", "--rootdir", str(ROOT), *spread]
    reports = _Reports(emit, bench.rehearsed)
    code = pytest.main([*arguments, str(ROOT / "tests" / "gpu")], plugins=[reports])
    if not reports.passed:
        raise RuntimeError(f"no test passed; pytest ended with {code!r}")
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {code!r}")


class _Reports:
    """A plugin of pytest that emits each test's outcome as soon as it is known."""

    def __init__(self, emit: Emit, rehearsed: bool) -> None:
        self._emit, self._rehearsed, self.passed = emit, rehearsed, 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self._rehearsed:
            items[:] = {item.nodeid.partition("[")[0]: item for item in reversed(items)}.values()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, took = report.nodeid.removeprefix("tests/gpu/"), round(report.duration, 2)
        if report.failed:
            self._emit({"test": name, "outcome": "failed", "s": took, "error": report.longreprtext[-1500:]})
        elif report.skipped:
            self._emit({"test": name, "outcome": "skipped"})
        elif report.when == "call":
            self.passed += 1
            self._emit({"test": name, "outcome": "passed", "s": took})
