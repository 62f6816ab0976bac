"""``fxfuse explain`` and ``fxfuse bench``: look at a model, and time it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxfuse.cli.serving import Implementation, Serving, bench_in_engine
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
    engine: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="time the model and its export in an engine instead: vllm or llama.cpp"),
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FOLDER", help="with --engine: what fxfuse export wrote")
    ] = None,
    python: Annotated[
        str, typer.Option(metavar="FILE", help="with --engine: the Python that has it; by default fxfuse's own")
    ] = "",
    tokens: Annotated[int, typer.Option(min=1, help="with --engine: tokens after the first")] = 16,
    threads: Annotated[
        int | None, typer.Option(min=1, help="with --engine: CPU threads that it computes with; by default all cores")
    ] = None,
    implementation: Annotated[
        Implementation, typer.Option(help="with --engine vllm: whose code computes layers")
    ] = Implementation.auto,
    compiled: Annotated[bool, typer.Option("--compiled", help="with --engine vllm: let it compile, too")] = False,
    json: Json = False,
) -> None:
    """Time a model under torch.compile, as it is and as a plan leaves it; or its export in an engine.

    A language model is timed on a prompt (prefill) and on one token
    without a cache (decode); any other model on its example call.

    The contestants take turns, and the original runs twice, from two
    compilations: where these differ by more than 1.5% the run is void and
    the exit code is 1.

    With --engine, vLLM or llama.cpp runs the model, twice, and its export,
    each in a process of its own, and they are asked for the first token after
    a prompt and for the tokens after it. The model is a folder (for
    llama.cpp, a GGUF file) or smollm2.

    [bold]Examples[/bold]
      fxfuse bench smollm2 --plan plan.json --length 128
      fxfuse bench ./my-llama --plan plan.json --batch 4 --dtype bfloat16
      fxfuse bench smollm2 --dtype bfloat16 --length 32 --prepack
      fxfuse bench my_project.models:tiny --repeats 51 --json
      fxfuse bench smollm2 --engine vllm --export exported --python vllm-venv/bin/python --batch 8
    """
    if engine is not None:
        if plan is not None or prepack or inner != "inductor":
            raise typer.BadParameter(
                "--plan, --inner and --prepack are of torch.compile: the export has its plan in it"
            )
        if export is None:
            raise typer.BadParameter("--engine compares a model with its export: name that with --export")
        how = Serving(engine, python, implementation, compiled, None if dtype is None else dtype.value, threads)
        return bench_in_engine(model, export, how, batch or 1, length or 256, tokens, repeats, json)
    if export is not None:
        raise typer.BadParameter("--export goes with --engine: vllm or llama.cpp")
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
    return None


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
