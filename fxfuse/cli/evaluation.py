"""``fxfuse eval``: what a plan costs, in perplexity and in tasks, before and after healing."""

from __future__ import annotations

import copy
from dataclasses import replace
from json import dumps, loads
from typing import TYPE_CHECKING, Annotated

import typer

from fxfuse.cli.shared import (
    Batch,
    CastTo,
    DType,
    Json,
    LanguageModel,
    PlanFile,
    Sequence,
    Text,
    Tokens,
    app,
    batches,
    load_with_tokenizer,
    plan_for,
    read_plan,
)

if TYPE_CHECKING:
    from torch import nn

    from fxfuse.data.loading import Loaded
    from fxfuse.measure.evaluation import Metrics
    from fxfuse.plan import Plan

ORIGINAL, PLANNED, HEALED = "original", "planned", "healed"


@app.command(name="eval")
def evaluate(
    model: LanguageModel,
    plan: PlanFile = None,
    healed: Annotated[
        str | None,
        typer.Option("--healed", metavar="MODEL", help="the same model, healed for the plan: compared with both"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="also run these, by lm_eval: cloze,copying,... or all, which need no network"
        ),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option("--task-limit", min=1, help="documents of each task, at the most")
    ] = None,
    text: Text = None,
    length: Sequence = 256,
    tokens: Tokens = 8192,
    batch: Batch = 1,
    dtype: CastTo = None,
    json: Json = False,
) -> None:
    """Perplexity of a model on a text; with a plan, of the planned model, and how far it is from the original.

    A model that was healed for a plan, or saved with one applied, runs under
    that plan. With --tasks it also answers questions, copies, calculates and
    finds what it was told 1,000 tokens before; scores have intervals, and so
    have their differences to the original's. It takes pip install
    'fxfuse[eval]'.

    [bold]Examples[/bold]
      fxfuse eval smollm2
      fxfuse eval smollm2 --plan plan.json --text corpus.txt --tokens 20000
      fxfuse eval smollm2 --plan plan.json --tasks all
      fxfuse eval smollm2 --healed ./healed --tasks cloze,rewriting
    """
    import fxfuse
    from fxfuse.measure.tasks import harness

    chosen, loaded = read_plan(plan), load_with_tokenizer(model, dtype)
    models = _models(loaded, chosen, healed, dtype)
    names = [] if tasks is None else [name.strip() for name in tasks.split(",")]
    if tasks is not None:
        harness.check(loaded.model, loaded.tokenizer, names, task_limit)
    found: dict[str, Metrics] = {}
    for name, each in models.items():
        if name == ORIGINAL and len(models) > 1:
            continue  # it is what the others are measured against
        read = batches(loaded, text, "hold out", length, tokens, batch or 1)
        found[name] = fxfuse.evaluate(
            each, read, models.get(ORIGINAL) if len(models) > 1 else None, max_tokens=tokens, progress=not json
        )
    if tasks is not None:
        scores = {
            name: harness.score(each, loaded.tokenizer, names, limit=task_limit, progress=not json)
            for name, each in models.items()
        }
        reference = scores.get(ORIGINAL, ()) if len(models) > 1 else ()
        found = {
            name: replace(metrics, tasks=scores[name], reference_tasks=reference) for name, metrics in found.items()
        }
    typer.echo(_as_json(found) if json else _as_text(found))


def _models(loaded: Loaded, chosen: Plan | None, healed: str | None, dtype: DType | None) -> dict[str, nn.Module]:
    """The models to compare, the original first; just one of them if there is nothing to compare."""
    import fxfuse
    from fxfuse.errors import PlanError

    if loaded.plan is not None:
        if healed is not None:
            raise PlanError("--healed is compared with the original model, and the one given has a plan of its own")
        own = plan_for(loaded, chosen)
        assert own is not None
        return {PLANNED: fxfuse.apply(loaded.model, own, inner="eager")}
    models = {ORIGINAL: loaded.model}
    restored = None if healed is None else load_with_tokenizer(healed, dtype)
    if restored is not None and restored.plan is None:
        raise PlanError(f"{healed} was healed for no plan: give the model that was")
    plan = chosen if restored is None else plan_for(restored, chosen)
    if plan is not None:
        models[PLANNED] = fxfuse.apply(copy.deepcopy(loaded.model), plan, inner="eager")
    if restored is not None and plan is not None:
        models[HEALED] = fxfuse.apply(restored.model, plan, inner="eager")
    return models


def _as_json(found: dict[str, Metrics]) -> str:
    """The metrics of the planned model, or of the only one; those of the healed one are an entry of theirs."""
    first, *others = found
    data = loads(found[first].to_json())
    return dumps(data | {name: loads(found[name].to_json()) for name in others}, indent=2)


def _as_text(found: dict[str, Metrics]) -> str:
    from fxfuse.measure.tasks.scores import table

    parts = []
    for name, metrics in found.items():
        title = [f"{name}:"] if len(found) > 1 else []
        parts.append("\n".join([*title, str(replace(metrics, tasks=(), reference_tasks=()))]))
    scores = {name: metrics.tasks for name, metrics in found.items()}
    first = next(iter(found.values()))
    if first.reference_tasks:
        scores = {ORIGINAL: first.reference_tasks, **scores}
    if first.tasks:
        parts.append(table(scores))
    return "\n\n".join(parts)
