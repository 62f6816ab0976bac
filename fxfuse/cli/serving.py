"""``fxfuse bench --engine``: a model and its export in the engine that serves them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from fxfuse.bench.engines.contest import Contest, Requests
    from fxfuse.bench.engines.process import Engine, Settings

EXPORT = "export"


class Implementation(StrEnum):
    """Whose code computes the layers in vLLM."""

    auto = "auto"
    vllm = "vllm"
    transformers = "transformers"


@dataclass(frozen=True)
class Serving:
    """The engine: its name, the Python that has it, its threads, and for vLLM how it computes."""

    engine: str
    python: str
    implementation: Implementation
    compiled: bool
    dtype: str | None
    threads: int | None

    def settings(self, requests: Requests, export: Path) -> Settings:
        """For the worker of the engine; three of them share a GPU. The code of transformers computes both, or neither.

        Raises:
            OptionError: what is only vLLM's is asked of another engine.
        """
        from fxfuse.bench.engines.process import Settings
        from fxfuse.errors import OptionError
        from fxfuse.exporting.folder import format_of

        if self.engine != "vllm" and (self.implementation != "auto" or self.compiled or self.dtype is not None):
            raise OptionError(f"--implementation, --compiled and --dtype are vLLM's: {self.engine} knows none of them")
        chosen = self.implementation
        if chosen == "auto" and format_of(export) == "transformers":
            chosen = Implementation.transformers
        return Settings(
            implementation=chosen.value,
            compiled=self.compiled,
            dtype=self.dtype or "auto",
            room=requests.room,
            sequences=requests.batch,
            memory=0.3,
            threads=self.threads,
        )


def bench_in_engine(
    model: str, export: Path, how: Serving, batch: int, length: int, tokens: int, rounds: int, as_json: bool
) -> None:
    """Time the original, twice, and its export in one engine, print it, and exit with 1 if the run is void."""
    from fxfuse.bench.engines.contest import Requests, contest
    from fxfuse.bench.engines.process import serving
    from fxfuse.bench.timing import AGAIN, ORIGINAL, Machine

    requests = Requests(batch, length, tokens)
    settings = how.settings(requests, export)
    machine = Machine.here()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:

        def start(name: str, path: Path) -> Engine:
            log = Path(scratch, f"{name}.log")
            made = stack.enter_context(serving(how.engine, path, log, how.python, settings))
            typer.echo(f"{name}: {made.served.description}", err=True)
            return made

        planned = start(EXPORT, export)  # first, since to write the original may take longer than to see what is wrong
        original = original_for(how.engine, model, Path(scratch))
        engines = {name: start(name, original) for name in (ORIGINAL, AGAIN)}
        done = contest({**engines, EXPORT: planned}, requests, rounds, progress=not as_json)
    if as_json:
        typer.echo(json.dumps({"machine": asdict(machine), **done.as_dict()}, indent=2))
    else:
        typer.echo(machine)
        show(done)
    if done.void:
        typer.echo("fxfuse: this run is void: two copies of one model differ; try again on a quieter machine", err=True)
        raise typer.Exit(1)


def original_for(engine: str, model: str, scratch: Path) -> Path:
    """The model as the engine reads it: itself, or smollm2 written to ``scratch``.

    Raises:
        LoadError: it is none that an engine could load.
    """
    from fxfuse.data.loading import gguf_of, load
    from fxfuse.errors import LoadError

    if engine == "llama.cpp":
        return gguf_of(model) or Path(model)
    if Path(model).is_dir():
        return Path(model)
    if model != "smollm2":
        raise LoadError(f"{model!r} is no folder: {engine} loads those, and smollm2 is written to one")
    loaded = load(model)
    save: Callable[[Path], object] = loaded.model.save_pretrained  # type: ignore[assignment]  # of Hugging Face
    save(scratch / model)
    return scratch / model


def show(done: Contest) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    from fxfuse.bench.timing import ORIGINAL

    asked = done.requests
    typer.echo(f"batch {asked.batch}, {asked.length} tokens and then {asked.tokens + 1}")
    table = Table("phase", "model", "median ms", "to original", "tokens per second")
    for phase, samples in done.phases.items():
        for name in samples.seconds:
            ratio = "" if name == ORIGINAL else f"{samples.ratio(name, ORIGINAL):.4f}"
            seconds = samples.median(name)
            table.add_row(phase, name, f"{seconds * 1e3:.3f}", ratio, f"{asked.batch / seconds:.1f}")
        table.add_section()
    Console().print(table)
