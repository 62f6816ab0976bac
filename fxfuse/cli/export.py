"""``fxfuse export``: from a model and its plan to a folder that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fxfuse.cli.shared import CastTo, LanguageModel, app, load_with_tokenizer, plan_for, read_plan


@app.command()
def export(
    model: LanguageModel,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="where the export goes")],
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="a plan; by default the one that the model was healed for"),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="transformers: any model of Hugging Face, with a modelling file of its own; nemotron-nas: what is "
            "Llama-shaped, which vLLM serves natively; gguf: the same for llama.cpp; pt2: any model, compiled for this "
            "kind of machine, which torch alone runs, from Python and C++"
        ),
    ] = "transformers",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is in the folder")] = False,
    check: Annotated[
        bool, typer.Option(help="load what was written and compare its logits before the folder appears")
    ] = True,
    type: Annotated[
        str | None, typer.Option(help="gguf: the type of matrices, f32, f16, bf16 or q8_0; by default the model's own")
    ] = None,
    dtype: CastTo = None,
) -> None:
    """Write a model under a plan to a folder that others load, without fxfuse.

    Tokenizer, generation config and plan lie beside the weights. What the
    format cannot say is refused with the reason before anything is written.

    [bold]Examples[/bold]
      fxfuse export smollm2 --plan plan.json --format nemotron-nas -o exported
      fxfuse export ./healed -o exported
      fxfuse export smollm2 --plan plan.json --format gguf --type q8_0 -o exported
    """
    import fxfuse
    from fxfuse.data.loading import gguf_of
    from fxfuse.errors import ExportError

    loaded = load_with_tokenizer(model, dtype)
    chosen = plan_for(loaded, read_plan(plan))
    if chosen is None:
        raise ExportError(f"{model} was healed for no plan: give one with --plan")
    options: dict[str, Any] = {} if type is None else {"type": type}
    if format == "gguf" and (source := gguf_of(model)) is not None:
        options["vocabulary"] = source  # transformers, which read it, keeps less of it than the file has
    fxfuse.export(
        loaded.model,
        chosen,
        output,
        format,
        loaded.tokenizer,
        overwrite=overwrite,
        check=check,
        progress=True,
        **options,
    )
    typer.echo(f"written to {output}, with its plan")
