"""The runner: what is common to all passes over one graph.

It keeps their order as they are given to it, puts the graph in canonical form first, and owns what no pass has to
think of: all or nothing, lint, time, dumps, verification, and how many rewrites may be made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import fx

from fxfuse.graph.surgery import transaction
from fxfuse.passes.base import Control, Pass, PassReport, check_fuel
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.normalise.normal import normalise
from fxfuse.passes.verify import Verifier

log = logging.getLogger(__name__)


class Runner:
    """Runs passes over one graph, one after the other; see :func:`running`."""

    def __init__(self, gm: fx.GraphModule, control: Control, dump: Path | None = None) -> None:
        self.gm, self.reports = gm, list[PassReport]()
        self._control, self._dump, self._graph = control, dump, Canonical(gm)
        self._is_canonical = False

    def name(self, names: Mapping[fx.Node, str] | None) -> Canonical:
        """The graph for who has to look at it between passes, its weights under the caller's ``names``."""
        self._graph = Canonical(self.gm, names)
        return self._graph

    def __call__(self, pass_: Pass) -> PassReport:
        """Run one pass."""
        started = time.perf_counter()
        if pass_.canonical and not self._is_canonical:
            normalise(self.gm)
        report = pass_.run(self._graph, self._control)
        self._is_canonical = True
        if report:
            self._graph.forget()
            _write(self._dump, self.gm, len(self.reports) + 1, report.name)
        report.seconds = time.perf_counter() - started
        log.debug("%s\n  %.3f s", report, report.seconds)
        self.reports.append(report)
        return report


@contextmanager
def running(
    gm: fx.GraphModule,
    *,
    inputs: Sequence[object] | None = None,
    verify: bool = False,
    max_rewrites: int | None = None,
    dump: Path | None = None,
    tied: bool = False,
) -> Iterator[Runner]:
    """A runner for ``gm``; if anything raises, the graph is as it was.

    Args:
        gm: any graph.
        inputs: example inputs of the graph, for ``verify``.
        verify: compare what is rewritten with what it replaces, in float64 on ``inputs``.
        max_rewrites: how many exact rewrites all passes together may make.
        dump: a folder that gets the graph as it is and after each pass that changed it, as text.
        tied: leave writes tied to their readers (:mod:`fxfuse.graph.written`).

    Raises:
        OptionError: ``verify`` without ``inputs``, or a negative ``max_rewrites``.
    """
    check_fuel(max_rewrites)
    control = Control(Verifier.of(gm, inputs, verify), max_rewrites)
    with transaction(gm, tied=tied):
        _write(dump, gm, 0, "as_given")
        yield Runner(gm, control, dump)


def run(
    gm: fx.GraphModule,
    pass_: Pass,
    *,
    inputs: Sequence[object] | None = None,
    verify: bool = False,
    max_rewrites: int | None = None,
) -> PassReport:
    """Run one pass by itself, over any graph."""
    with running(gm, inputs=inputs, verify=verify, max_rewrites=max_rewrites) as runner:
        return runner(pass_)


def _write(folder: Path | None, gm: fx.GraphModule, number: int, name: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        text = gm.graph.python_code("self", verbose=True, include_stride=False).src
        (folder / f"{number:02}_{name}.py").write_text(text)
