"""``fxfuse record``, ``plan`` and ``demo``: from a model to a plan that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxfuse.cli.shared import (
    Batch,
    CastTo,
    Json,
    LanguageModel,
    PlanFile,
    Sequence,
    Text,
    Tokens,
    app,
    batches,
    load_unplanned,
    load_with_tokenizer,
    plan_for,
    read_plan,
    writable,
    writable_folder,
)

if TYPE_CHECKING:
    from fxfuse.bench.branches import Phase
    from fxfuse.data.loading import Loaded
    from fxfuse.planning import Costs


@app.command()
def record(
    model: LanguageModel,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE")] = Path("recording.safetensors"),
    plan: PlanFile = None,
    text: Text = None,
    length: Sequence = 256,
    tokens: Tokens = 2048,
    batch: Batch = 1,
    dtype: CastTo = None,
    max_group: Annotated[int, typer.Option(min=0, help="longest run of consecutive FFNs measured as a group")] = 4,
    json: Json = False,
) -> None:
    """Measure which branches depend on which, by dropping each on a text.

    m branches cost about m / 2 runs of the model over the text. An interrupted recording goes on where it was: the
    state lies beside the output, as FILE.partial, until that is written.

    [bold]Examples[/bold]
      fxfuse record smollm2
      fxfuse record ./my-llama --text corpus.txt --tokens 16384 -o my.safetensors
      fxfuse record ./my-llama --plan drops.json -o dropped.safetensors
    """
    import fxfuse

    writable(output, plan, text, Path(model))
    partial = output.with_name(f"{output.name}.partial")
    writable(partial, plan, text, Path(model))
    chosen, loaded = read_plan(plan), load_with_tokenizer(model, dtype)
    recording = fxfuse.record(
        loaded.model,
        batches(loaded, text, "record", length, tokens, batch or 1),
        plan_for(loaded, chosen),
        max_tokens=tokens,
        max_group=max_group,
        resume=partial,
        progress=not json,
    )
    recording.save(output)
    partial.unlink(missing_ok=True)
    typer.echo(recording.to_json() if json else f"{recording}\nwritten to {output}")


@app.command()
def plan(
    recording: Annotated[Path, typer.Argument(metavar="RECORDING", help="what fxfuse record wrote")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE")] = Path("plan.json"),
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="the recorded model, with its tokenizer: measure on it"),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0.0, help="nats per token that the plan may cost; with --model, 0.05 by default")
    ] = None,
    drop: Annotated[int | None, typer.Option(min=0, help="attentions to drop; with --model, at the most")] = None,
    score: Annotated[str, typer.Option(help="what makes an attention cheap: kl, cosine or norm_ratio")] = "kl",
    max_distance: Annotated[float | None, typer.Option(min=0.0, help="largest distance of FFNs in a group")] = None,
    max_width: Annotated[int | None, typer.Option(min=1, help="most hidden units of a wide FFN")] = None,
    keep_last: Annotated[bool, typer.Option("--keep-last", help="leave the last FFN of each run alone")] = False,
    target_latency: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="search a plan that takes this share of the original's time")
    ] = None,
    max_kv_bytes: Annotated[float | None, typer.Option(min=0.0, help="the same for bytes of KV cache")] = None,
    max_memory: Annotated[float | None, typer.Option(min=0.0, help="the same for bytes of weights and cache")] = None,
    phase: Annotated[str, typer.Option(help="what is to be fast: decode or prefill")] = "decode",
    context: Annotated[int, typer.Option(min=2, help="tokens in the KV cache, or in the prompt")] = 2048,
    device: Annotated[str | None, typer.Option(help="model the time on this GPU (h100, ...), and time nothing")] = None,
    tp: Annotated[int, typer.Option(min=1, help="among how many of them the model is divided")] = 1,
    narrow: Annotated[
        list[float] | None, typer.Option(min=0.0, max=1.0, help="FFNs may keep this share of their units; repeatable")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="after which no edit is exchanged any more")] = None,
    heal: Annotated[
        bool, typer.Option("--heal", help="let attentions become linear maps, and choose by what healing gives")
    ] = False,
    heal_text: Annotated[
        list[Path] | None,
        typer.Option("--heal-text", metavar="FILE", help="a kind of text to heal on while searching; several times"),
    ] = None,
    text: Text = None,
    length: Sequence = 256,
    tokens: Tokens = 2048,
    dtype: CastTo = None,
    json: Json = False,
) -> None:
    """Choose what to drop and what to fuse, from a recording.

    With --model each edit is measured on it, and kept while the planned
    model's next-token distribution stays within --max-kl of the original's.
    Without, the plan is what the recording proposes: a lead, not a result.
    With a target the time of every branch is measured, and plans that reach
    it are searched for the one of least KL; with --heal of the healed models,
    whose plan then has to be healed for good by fxfuse heal. The state of the
    search lies beside the output, as FILE.search, until that is written.

    [bold]Examples[/bold]
      fxfuse plan recording.safetensors --model smollm2 --max-kl 0.05
      fxfuse plan recording.safetensors --model smollm2 --target-latency 0.8 --heal
      fxfuse plan recording.safetensors --drop 4 --max-distance 0.1
    """
    from fxfuse.errors import OptionError
    from fxfuse.measure.recording import Recording
    from fxfuse.planning import Choices, Effort, Limits, Targets, decide, find_plan, plan_of

    writable(output, recording, text, None if model is None else Path(model))
    recorded = Recording.load(recording)
    targets = Targets(latency=target_latency, memory=max_memory, kv_bytes=max_kv_bytes, kl=max_kl)
    if targets:
        if model is None:
            raise OptionError("a target is reached by measuring: give --model")
        loaded = load_unplanned(model, dtype)
        recorded.check(loaded.model)  # before minutes go into measuring
        read = list(batches(loaded, text, "plan", length, tokens, 1))
        costs = _costs(loaded, read, context, phase, device, tp, not json)
        state = output.with_name(f"{output.name}.search")
        effort = Effort(minutes=minutes, narrow=tuple(narrow or ()))
        kinds = _healed_on(loaded, heal_text, length) if heal or heal_text else {}
        found = find_plan(
            recorded,
            loaded.model,
            read,
            targets,
            costs,
            heal_on=kinds,
            effort=effort,
            resume=state,
            progress=not json,
        )
        found.plan.save(output)
        state.unlink(missing_ok=True)
        typer.echo(found.to_json() if json else f"{found}\nwritten to {output}")
        return
    if heal or heal_text:
        raise OptionError("--heal is part of a search: give a target, as in --target-latency 0.8")
    choices = Choices(
        drop=drop,
        score=score,  # type: ignore[arg-type]  # checked where it is used
        limits=Limits(max_distance=max_distance, max_width=max_width, keep_last=keep_last),
        max_kl=0.05 if model is not None and max_kl is None else max_kl,
    )
    if model is None:
        decisions = decide(recorded, choices)
    else:
        loaded = load_unplanned(model, dtype)
        read = list(batches(loaded, text, "plan", length, tokens, 1))
        decisions = decide(recorded, choices, loaded.model, read, progress=not json)
    made = plan_of(recorded, decisions)
    made.save(output)
    if json:
        typer.echo(made.to_json())
        return
    for decision in decisions:
        typer.echo(decision)
    typer.echo(f"{len(made.drop)} dropped, {len(made.parallel)} groups, written to {output}")


def _healed_on(loaded: Loaded, texts: list[Path] | None, length: int) -> dict[str, list[dict[str, object]]]:
    """As much of each kind of text as a search reads."""
    from fxfuse.data.text import batches_of, docstrings, python_documentation, read_text
    from fxfuse.planning import Effort

    given = {str(path): read_text(path) for path in texts or ()}
    given = given or {"documentation": python_documentation("record"), "docstrings": docstrings()}
    tokens = Effort().heal_tokens
    return {name: list(batches_of(loaded, text, length, tokens, batch=2)) for name, text in given.items()}


def _costs(
    loaded: Loaded, read: list[dict[str, object]], context: int, phase: str, device: str | None, tp: int, progress: bool
) -> Costs:
    """What the branches cost: modelled for ``device``, or measured here."""
    from fxfuse.planning import measure_costs
    from fxfuse.planning.modelled import model_costs
    from fxfuse.planning.text import prompt

    if phase not in ("decode", "prefill"):
        raise typer.BadParameter(f"--phase is decode or prefill, not {phase}")
    chosen: Phase = "decode" if phase == "decode" else "prefill"
    if device is not None:
        return model_costs(loaded.model, device, tp=tp, context=context, phase=chosen)
    return measure_costs(loaded.model, prompt(read, context), chosen, progress=progress)


@app.command()
def demo(
    model: LanguageModel = "smollm2",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="where the files go")] = Path("demo"),
    target_latency: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="share of the original's decode time that the plan may take")
    ] = 0.95,
    dtype: CastTo = None,
    json: Json = False,
) -> None:
    """The whole way of a model, in fifteen minutes on two cores, with one table last.

    Records it, measures what its branches cost, searches the plan of least KL
    that decodes in --target-latency of the time, heals it, judges it on text
    that took no part, and times it. Writes recording.safetensors, costs.json,
    plan.json, search.json, report.html and the healed model, healed/, whose
    plan lies with it. The texts are those that come with Python and torch.
    Interrupted, it goes on where it was; what is in the folder is used again.

    The exit code is 1 if the latencies are void: two compilations of the
    original differed by more than 1.5%.
    """
    from rich.console import Console

    from fxfuse.cli.demo import FILES, Sizes, run

    writable_folder(output, *FILES)
    loaded = load_unplanned(model, dtype)
    result = run(loaded, output, target_latency, Sizes(), Console(stderr=json))
    if json:
        typer.echo(result.to_json())
    if result.void:
        typer.echo(
            "fxfuse: the latencies are void: two copies of one program differ; try on a quieter machine", err=True
        )
        raise typer.Exit(1)
