"""``fxfuse simulate``: what a decode step should cost on GPUs that are not here, term by term, and where it fits."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxfuse.cli.shared import Json, Line, PlanFile, app, load, plan_for, read_plan, show_lines, writable

if TYPE_CHECKING:
    from fxfuse.hardware.decode import Setting, Terms
    from fxfuse.hardware.layout import Layout
    from fxfuse.hardware.memory import Memory
    from fxfuse.plan import Plan
    from fxfuse.report.curves import Curves

BATCHES = tuple(2**power for power in range(9))
CONTEXTS = tuple(2**power for power in range(9, 18))
"""Of the picture."""


class Weights(StrEnum):
    """What weights are kept in."""

    bfloat16 = "bfloat16"
    float8 = "float8"
    float4 = "float4"


Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="llama-70b, llama-405b, nemotron-49b, nemotron-253b, nemotron-253b-unfused, or a language model of your "
        "own: a Hugging Face model folder, a GGUF file, smollm2, or module:function",
        show_default=False,
    ),
]


@app.command()
def simulate(
    models: Models,
    plan: PlanFile = None,
    gpu: Annotated[str, typer.Option(help="a100, a10, a6000, h100, h200 or b100")] = "h100",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs that share each branch: 1, 2, 4 or 8")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="sequences that are decoded together")] = 1,
    context: Annotated[int, typer.Option(min=1, help="tokens of each sequence in the cache")] = 2048,
    weights: Annotated[
        Weights, typer.Option(help="what weights are kept in; the cache is bfloat16")
    ] = Weights.bfloat16,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw latency over batch and over context, a PNG")
    ] = None,
    json: Json = False,
) -> None:
    """Model the latency of a decode step on a GPU, term by term, and whether the model fits there.

    Nothing is measured: data sheets, others' measurements and assumptions,
    as fxfuse/hardware/decode.py lists them. No GPU is needed. Each model is
    compared with the first one, and under the plan if there is one.

    [bold]Examples[/bold]
      fxfuse simulate llama-405b nemotron-253b --tensor-parallel 8 --weights float8
      fxfuse simulate ./my-llama --plan plan.json --gpu a100 --batch 32
      fxfuse simulate nemotron-253b --gpu b100 --weights float4 --plot latency.png
    """
    from fxfuse.hardware import decode, gpus
    from fxfuse.hardware.memory import memory
    from fxfuse.report.curves import save_curves

    if plot is not None:
        writable(plot, plan)
    setting = decode.Setting(gpus.find(gpu), tensor_parallel, batch, context, weights.value)
    chosen = read_plan(plan)
    layouts = [layout for model in models for layout in _layouts(model, chosen)]
    rows = [(layout, decode.step(layout, setting), memory(layout, setting)) for layout in layouts]
    first = rows[0][1].seconds
    lines = [_line(layout, terms, first, setting) for layout, terms, _ in rows]
    where = f"{setting.gpu.name} x {tensor_parallel}"
    if plot is not None:
        title = f"{where}, {weights} weights; left: context {context}, right: batch {batch}"
        save_curves(_curves(layouts, setting), title, plot)
    if json:
        held = {layout.name: {**asdict(need), "fits": need.fits, "tokens": need.tokens} for layout, _, need in rows}
        curves = [asdict(curve) for curve in _curves(layouts, setting)]
        found = {"gpu": where, "modelled": lines, "memory, bytes on each GPU": held, "curves": curves}
        typer.echo(json_format.dumps(found, indent=1))
        return
    typer.echo(f"modelled, ms of a decode step, {where}, batch {batch}, context {context}, {weights} weights")
    show_lines(lines)
    typer.echo("memory, GB on each GPU")
    show_lines([_need(layout, need) for layout, _, need in rows])


def _layouts(model: str, plan: Plan | None) -> list[Layout]:
    """A model as it is, and under the plan that is given; one that needs its own plan under that alone."""
    from fxfuse.hardware import released
    from fxfuse.hardware.layout import planned

    needed = False
    if model in released.NAMES:
        found = released.find(model)
    else:
        from torch import Tensor

        from fxfuse.errors import LoadError
        from fxfuse.report.shapes import layout_of

        loaded = load(model, None, None, None, None)
        ids = loaded.kwargs.get("input_ids")
        if not loaded.reads_tokens or not isinstance(ids, Tensor):
            raise LoadError(f"{model} is no language model that is called with input_ids alone; only such are priced")
        plan, needed = plan_for(loaded, plan), loaded.plan is not None
        found = layout_of(loaded.model, ids, model)
    if plan is None:
        return [found]
    made = replace(planned(found, _left(plan, found) if needed else plan), name=f"{found.name}, planned")
    return [made] if needed else [found, made]


def _left(plan: Plan, layout: Layout) -> Plan:
    """What is still to be done of a plan that a model was saved with: what it drops or made linear may be gone."""
    from fxfuse.plan import Plan

    names = {shape.name for shape in layout.shapes}
    drop, linear = ([name for name in edited if name in names] for edited in (plan.drop, plan.linear))
    narrow = {name: units for name, units in plan.narrow.items() if name in names}
    return Plan(drop=drop, linear=linear, narrow=narrow, parallel=plan.parallel)


def _line(layout: Layout, terms: Terms, first: float, setting: Setting) -> Line:
    return {
        "model": layout.name,
        "ms": round(terms.seconds * 1e3, 3),
        "tokens/s": round(setting.batch / terms.seconds, 1),
        "speed-up": round(first / terms.seconds, 3),
        **{name.replace("_", "-"): round(seconds * 1e3, 3) for name, seconds in terms.parts.items()},
        "kernels": terms.kernels,
        "reductions": terms.reductions,
    }


def _need(layout: Layout, need: Memory) -> Line:
    tokens = need.tokens if need.fits else 0
    return {
        "model": layout.name,
        "weights": round(need.weights / 1e9, 2),
        "of": round(need.usable / 1e9, 2),
        "fits": "yes" if need.fits else "no",
        "KV, KB a token": round(need.token / 1e3, 2),
        "room for tokens": "any number" if tokens is None else tokens,
        "packed copies": round(need.copied / 1e9, 2),
        "spike while packing": round(need.spike / 1e9, 2),
    }


def _curves(layouts: list[Layout], setting: Setting) -> tuple[Curves, Curves]:
    from fxfuse.hardware.decode import step
    from fxfuse.report.curves import Curves

    def ms(settings: list[Setting]) -> dict[str, list[float]]:
        return {layout.name: [step(layout, varied).seconds * 1e3 for varied in settings] for layout in layouts}

    over_batch = ms([replace(setting, batch=size) for size in BATCHES])
    over_context = ms([replace(setting, context=size) for size in CONTEXTS])
    return Curves("sequences in a batch", BATCHES, over_batch), Curves("tokens in the cache", CONTEXTS, over_context)
