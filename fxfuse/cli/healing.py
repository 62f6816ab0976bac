"""``fxfuse heal``: from a model and its plan to healed weights, beside which the plan is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxfuse.cli.shared import Batch, CastTo, Json, LanguageModel, Sequence, app, load_unplanned, read_plan, save_folder

if TYPE_CHECKING:
    from collections.abc import Mapping


@app.command()
def heal(
    model: LanguageModel,
    plan: Annotated[Path, typer.Option("--plan", metavar="FILE", help="a plan, as Plan.save writes it")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="where the model goes")],
    method: Annotated[
        str, typer.Option(help="fit (minutes), local (an hour), distill (a GPU), or several, as in fit,distill")
    ] = "fit",
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE", help="a text, UTF-8, of one kind; may be given several times"),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", metavar="NUMBER", help="how much a token of each text counts, in their order"),
    ] = None,
    own: Annotated[
        int,
        typer.Option("--own", min=0, metavar="TOKENS", help="tokens of text by the model itself, one more kind"),
    ] = 16384,
    length: Sequence = 256,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of each text")] = 16384,
    batch: Batch = 2,
    minutes: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER", help="how long to go on, in all or each: 30, or fit=5,distill=20; the rest stays as it is"
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FOLDER", help="keep what is done here, and go on from it")
    ] = None,
    dtype: CastTo = None,
    json: Json = False,
) -> None:
    """Get back, in the weights, what a plan has cost.

    Under the plan the healed model is nearer to the original on every kind of
    text, of each of which a fifth is held out to see that; else its weights
    stay as they are. Without the plan it is damaged, so the plan is kept in
    the folder. Several kinds of text (prose, code, what you serve) make the
    model better on all of them, and on others.

    [bold]Examples[/bold]
      fxfuse heal smollm2 --plan plan.json -o healed
      fxfuse heal ./my-llama --plan plan.json --text prose.txt --text code.txt --method fit,local -o healed
      fxfuse heal ./my-llama --plan plan.json --method fit,distill --minutes fit=5,distill=60 -o healed
    """
    import fxfuse
    from fxfuse.data.own_text import written_by
    from fxfuse.data.text import batches_of, python_documentation, read_text
    from fxfuse.errors import HealError, OptionError

    _new_folder(output)
    limits = _minutes(minutes)
    if weight and len(weight) != len(text or ()):
        raise OptionError(f"there are {len(weight)} weights and {len(text or ())} texts: give --weight for each --text")
    chosen, loaded = read_plan(plan), load_unplanned(model, dtype)
    assert chosen is not None  # it has to be given
    texts = {str(path): read_text(path) for path in text or ()}
    texts = texts or {"Python's documentation": python_documentation("record")}
    rows = batch or 2
    kinds: dict[str, list[Mapping[str, object]]] = {
        name: list(batches_of(loaded, each, length, tokens, rows)) for name, each in texts.items()
    }
    if own:
        kinds["own text"] = written_by(loaded.model, own, length, rows=rows, progress=not json)
    healing = fxfuse.heal(
        loaded.model,
        chosen,
        kinds,
        method.split(","),  # type: ignore[arg-type]  # checked where it is used
        weights=dict(zip(map(str, text or ()), weight or (), strict=False)),
        minutes=limits,
        resume=resume,
        progress=not json,
    )
    typer.echo(healing.to_json() if json else str(healing))
    if not healing.share:
        raise HealError("nothing was written, because no share of the change helps on every kind of text: give more")
    save_folder(loaded.model, loaded.tokenizer, chosen, output)
    if not json:
        typer.echo(f"written to {output}, with its plan")


def _minutes(given: str | None) -> float | dict[str, float] | None:
    """``30`` as a number, ``fit=5,distill=20`` as one for each."""
    from fxfuse.errors import OptionError

    if given is None:
        return None
    pairs = [part.partition("=") for part in given.split(",")]
    try:
        if len(pairs) == 1 and not pairs[0][1]:
            return float(given)
        return {method: float(limit) for method, _, limit in pairs}
    except ValueError:
        raise OptionError(f"--minutes {given}: give a number, or one for each method, as in fit=5,distill=20") from None


def _new_folder(folder: Path) -> None:
    """Say now, and not in an hour, that the model could not be written to ``folder``."""
    from fxfuse._common.files import check_writable
    from fxfuse.errors import FxfuseError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FxfuseError(f"{str(folder)!r} is there already and not empty: give another folder")
    check_writable(folder.parent / f"{folder.name}.partial")
