"""Signs of life of what takes minutes, on stderr: bars in a terminal, elsewhere a plain line now and then.

A step within a step is shown below it, or after it on its line.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY = 20.0
"""Seconds between two plain lines, and before the first: what is done sooner says nothing."""


@contextmanager
def bar(title: str, unit: str, total: int | None, shown: bool, still: bool = False) -> Iterator[Callable[[int], None]]:
    """Show that a step goes on, and yield a function that says that so many more units are done.

    Args:
        title: what is going on.
        unit: what is counted.
        total: how many there will be; unknown if None.
        shown: whether to show anything.
        still: write only when a unit is done, and have no thread that writes in between: for what is being timed.
    """
    global _display
    if not shown:
        yield lambda count: None
        return
    step, outer = _Step(title, unit, total), _display
    display = _display = outer or (_Bars(still) if _draws(Console(stderr=True)) else _Lines(still))
    try:
        with display if outer is None else nullcontext():
            display.begin(step)
            try:
                yield lambda count: display.moved(step, count)
            finally:
                display.end(step)
    finally:
        _display = outer


@dataclass(eq=False)
class _Step:
    title: str
    unit: str
    total: int | None
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        """As in ``recording: 512 of 1,024 tokens, 1:40, about 1:40 left``."""
        counted = f"{self.done:,}" + ("" if self.total is None else f" of {self.total:,}")
        text = f"{self.title}: {counted} {self.unit}, {_clock(self.elapsed)}"
        if self.total is None or not 0 < self.done < self.total:
            return text
        return f"{text}, about {_clock(self.elapsed * (self.total - self.done) / self.done)} left"

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began


class _Bars:
    """One bar for each step that goes on, gone when it is done."""

    def __init__(self, still: bool) -> None:
        counted = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"))
        columns = (TextColumn("{task.description}"), *counted, TimeElapsedColumn(), TimeRemainingColumn())
        self._still = still
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=not still)
        self._tasks: dict[_Step, TaskID] = {}

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, step: _Step) -> None:
        self._tasks[step] = self._progress.add_task(step.title, total=step.total, unit=step.unit)

    def moved(self, step: _Step, count: int) -> None:
        self._progress.update(self._tasks[step], advance=count, refresh=self._still)

    def end(self, step: _Step) -> None:
        self._progress.remove_task(self._tasks.pop(step))


class _Lines:
    """A line every `EVERY` seconds for all steps that go on, and one at the end of each that took so long."""

    def __init__(self, still: bool) -> None:
        self._steps: list[_Step] = []
        self._over = threading.Event()
        self._thread = None if still else threading.Thread(target=self._beat, daemon=True)
        self._written = time.monotonic()

    def __enter__(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def begin(self, step: _Step) -> None:
        self._steps.append(step)

    def moved(self, step: _Step, count: int) -> None:
        step.done += count
        if self._thread is None and time.monotonic() - self._written >= EVERY:
            self._write(self._steps)

    def end(self, step: _Step) -> None:
        self._steps.remove(step)
        if step.elapsed >= EVERY:
            self._write([*self._steps, step])

    def _beat(self) -> None:
        while not self._over.wait(max(0.0, self._written + EVERY - time.monotonic())):
            if time.monotonic() - self._written >= EVERY:
                self._write(self._steps)

    def _write(self, steps: list[_Step]) -> None:
        self._written = time.monotonic()
        print("; ".join(map(str, list(steps))), file=sys.stderr, flush=True)


_display: _Bars | _Lines | None = None
"""Where the outermost step is shown that goes on."""


def _draws(console: Console) -> bool:
    """Whether a bar can be drawn over and over on one line."""
    return console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)


def _clock(seconds: float) -> str:
    """As in 0:07, 12:30, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
