"""``fxfuse report``: what was recorded, planned and searched, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxfuse.cli.shared import PlanFile, app, read_plan, writable


@app.command()
def report(
    recording: Annotated[Path, typer.Argument(metavar="RECORDING", help="what fxfuse record wrote")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE")] = Path("report.html"),
    plan: PlanFile = None,
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="candidates of a search, JSON: a list of name, solver, latency (s), kl, and perhaps healed_kl, chosen",
        ),
    ] = None,
) -> None:
    """Write one HTML page that shows which branches depend on which, and what a plan makes of them.

    The page needs no network and no other file. It shows the dependency
    matrix and the scores of a recording; with --plan the plan over the
    stream, and why each edit was made or refused; with --results the
    candidates of a search by latency and KL.

    [bold]Examples[/bold]
      fxfuse report recording.safetensors
      fxfuse report recording.safetensors --plan plan.json -o page.html
    """
    from fxfuse.measure.recording import Recording
    from fxfuse.report.page import load_results, save_report

    writable(output, recording, plan, results)
    found = () if results is None else load_results(results)
    save_report(Recording.load(recording), output, read_plan(plan), found)
    typer.echo(f"written to {output}")
