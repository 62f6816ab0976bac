"""A bar on stderr for what takes minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def bar(title: str, unit: str, total: int | None, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves the bar on by so many units; nothing is drawn unless ``shown``.

    Args:
        title: what is going on.
        unit: what is counted.
        total: how many there will be; unknown if None.
        shown: draw it.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.update(task, advance=count)
