"""``fxfuse explain`` and ``fxfuse bench``: look at a model, and time it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxfuse.cli.shared import (
    Batch,
    CastTo,
    Json,
    Length,
    Model,
    PlanFile,
    app,
    known_backend,
    load,
    plan_for,
    read_plan,
    writable_folder,
)

if TYPE_CHECKING:
    from fxfuse.bench.timing import Comparison


@app.command()
def explain(
    model: Model,
    plan: PlanFile = None,
    text: Annotated[str | None, typer.Option(help="trace the model with this text")] = None,
    length: Length = None,
    batch: Batch = None,
    dtype: CastTo = None,
    json: Json = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="also write there what a bug report needs; no weights")
    ] = None,
) -> None:
    """Show the branches of a model's residual stream, and what can be fused or why not.

    Nothing is compiled. With a plan, the table shows what the plan does.

    [bold]Examples[/bold]
      fxfuse explain smollm2
      fxfuse explain ./my-llama --plan plan.json --dtype bfloat16
      fxfuse explain model.gguf --text "Hello there" --json
      fxfuse explain my_project.models:tiny --trace report
    """
    import fxfuse
    from fxfuse.report.bug_report import write_trace

    chosen = read_plan(plan)
    if trace is not None:
        writable_folder(trace, "versions.txt")
    loaded = load(model, dtype, text, length, batch)
    chosen = plan_for(loaded, chosen)
    if trace is not None:
        files = write_trace(loaded.model, trace, *loaded.args, plan=chosen, **loaded.kwargs)
        typer.echo(f"{trace}: {', '.join(files)}", err=True)
    explanation = fxfuse.explain(loaded.model, *loaded.args, plan=chosen, **loaded.kwargs)
    typer.echo(explanation.to_json() if json else str(explanation))


@app.command()
def bench(
    model: Model,
    plan: PlanFile = None,
    length: Length = None,
    batch: Batch = None,
    dtype: CastTo = None,
    repeats: Annotated[int, typer.Option(min=1, help="rounds; the medians over them are shown")] = 21,
    inner: Annotated[
        str, typer.Option(help="the backend that compiles the original and the planned graph")
    ] = "inductor",
    prepack: Annotated[
        bool, typer.Option("--prepack", help="on a CPU: prepack the planned model's weights where that is faster")
    ] = False,
    json: Json = False,
) -> None:
    """Time a model under torch.compile, as it is and as a plan leaves it.

    A language model is timed on a prompt (prefill) and on one token
    without a cache (decode); any other model on its example call.

    The contestants take turns, and the original runs twice, from two
    compilations: where these differ by more than 1.5% the run is void and
    the exit code is 1.

    [bold]Examples[/bold]
      fxfuse bench smollm2 --plan plan.json --length 128
      fxfuse bench ./my-llama --plan plan.json --batch 4 --dtype bfloat16
      fxfuse bench smollm2 --dtype bfloat16 --length 32 --prepack
      fxfuse bench my_project.models:tiny --repeats 51 --json
    """
    from fxfuse.bench import timing as timing

    chosen, compiler = read_plan(plan), known_backend(inner)
    loaded = load(model, dtype, None, length, batch)
    chosen = plan_for(loaded, chosen)
    phases = {"prefill": loaded, "decode": loaded.with_tokens(length=1)} if loaded.reads_tokens else {"call": loaded}
    machine = timing.Machine.here()
    comparisons = [
        timing.compare(phase, case, chosen, repeats, compiler, prepack=prepack, progress=not json)
        for phase, case in phases.items()
    ]
    if json:
        typer.echo(timing.to_json(machine, comparisons))
    else:
        typer.echo(machine)
        _show(comparisons)
    if any(comparison.void for comparison in comparisons):
        typer.echo(
            "fxfuse: this run is void: two copies of one program differ; try again on a quieter machine", err=True
        )
        raise typer.Exit(1)


def _show(comparisons: list[Comparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    from fxfuse.bench.timing import ORIGINAL, PLANNED

    table = Table("phase", "program", "median ms", "to original", "output distance")
    for comparison in comparisons:
        samples = comparison.samples
        for name in samples.seconds:
            ratio = "" if name == ORIGINAL else f"{samples.ratio(name, ORIGINAL):.4f}"
            distance = f"{comparison.distance:.2e}" if name == PLANNED else ""
            table.add_row(comparison.phase, name, f"{samples.median(name) * 1e3:.3f}", ratio, distance)
        table.add_section()
    Console().print(table)
