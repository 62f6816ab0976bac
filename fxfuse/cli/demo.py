"""The demo: a model recorded, planned, evaluated and timed, before and after, with what was found written to files."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fxfuse._common.progress import bar
from fxfuse.backend.applying import apply
from fxfuse.backend.frontend import twin
from fxfuse.bench.prefill_decode import Latency, Program, cache_bytes_per_token, decode, filled_cache, prefill
from fxfuse.bench.timing import Machine
from fxfuse.data.loading import Loaded
from fxfuse.data.text import batches_of, python_documentation
from fxfuse.errors import RecordError
from fxfuse.measure.evaluation import Metrics, evaluate
from fxfuse.measure.recorder import record
from fxfuse.measure.recording import Recording
from fxfuse.model.pruning import APART
from fxfuse.plan import Plan
from fxfuse.planning import Choices, decide, plan_of
from fxfuse.report import save_heatmap
from fxfuse.report.explanation import explain

ORIGINAL, AGAIN, UNPLANNED = "original", "original again", "original under ffnfuse"
DROPPED, FUSED = "attention dropped", "dropped and fused"

DROP_SHARE = 0.7
"""Of the budget, for drops: FFNs can only be grouped where attentions are gone."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything: the defaults take under ten minutes for a model of 135M parameters on two cores."""

    length: int = 256
    record: int = 1024
    plan: int = 4096
    evaluate: int = 6144
    prompt: int = 128
    context: int = 2048
    repeats: int = 35


@dataclass(frozen=True)
class Result:
    """What the demo found.

    Attributes:
        plan: the plan.
        metrics: of each program on text that neither recording nor planning has seen.
        latencies: prefill and decode, of each program under ffnfuse, and of the original under inductor, twice.
        cache_bytes: of keys and values a token costs, by program.
        machine: where.
    """

    plan: Plan
    metrics: Mapping[str, Metrics]
    latencies: tuple[Latency, ...]
    cache_bytes: Mapping[str, float]
    machine: Machine

    @property
    def void(self) -> bool:
        """Whether two compilations of the original differ too much for the latencies to mean anything."""
        return any(latency.samples.void(ORIGINAL, AGAIN) for latency in self.latencies)

    def to_json(self) -> str:
        """All of it, as a JSON object."""
        times = {
            f"{latencies.phase}, {latencies.tokens} tokens": {
                name: {
                    "median_seconds": latencies.samples.median(name),
                    "to_original": latencies.samples.ratio(name, ORIGINAL),
                    "to_original_under_ffnfuse": latencies.samples.ratio(name, UNPLANNED),
                }
                for name in latencies.samples.seconds
            }
            for latencies in self.latencies
        }
        data = {
            "machine": str(self.machine),
            "plan": json.loads(self.plan.to_json()),
            "metrics": {name: json.loads(metrics.to_json()) for name, metrics in self.metrics.items()},
            "latency": times,
            "latency_void": self.void,
            "cache_bytes_per_token": dict(self.cache_bytes),
        }
        return json.dumps(data, indent=2)


def run(loaded: Loaded, folder: Path, max_kl: float, sizes: Sizes, console: Console, inner: str = "inductor") -> Result:
    """Run the whole demo; writes recording.safetensors, plan.json and heatmap.png to ``folder``.

    A recording that is there is used again if it is of this model. ``inner`` compiles what is timed.

    Raises:
        FxfuseError: whatever stands in the way.
    """
    model = loaded.model.eval()
    console.rule("1  what is in the model")
    console.print(str(explain(model, *loaded.args, plan=None, **loaded.kwargs)), markup=False, highlight=False)
    console.rule("2  which branches depend on which")
    recording = _recorded(loaded, folder / "recording.safetensors", sizes, console)
    save_heatmap(recording, folder / "heatmap.png")
    console.print(f"{recording.tokens:,} tokens; {folder / 'heatmap.png'}")
    console.rule("3  the plan")
    text = python_documentation("plan")
    batches = list(batches_of(loaded, text, sizes.length, sizes.plan))
    decisions = decide(
        recording, Choices(max_kl=max_kl, drop_share=DROP_SHARE, score="cosine"), model, batches, progress=True
    )
    for decision in decisions:
        if decision.kl is not None:
            console.print(str(decision), markup=False, highlight=False)
    console.print(f"{sum(decision.kl is None for decision in decisions)} edits refused by what was recorded alone")
    plan = plan_of(recording, decisions)
    plan.save(folder / "plan.json")
    console.print(f"{len(plan.drop)} attentions dropped, {len(plan.parallel)} groups; {folder / 'plan.json'}")
    console.rule("4  what it costs, on other text")
    programs = {ORIGINAL: model, DROPPED: copy.deepcopy(model), FUSED: copy.deepcopy(model)}
    plans = {DROPPED: Plan(drop=plan.drop), FUSED: plan}
    metrics = _evaluated(loaded, programs, plans, sizes)
    _show_metrics(console, metrics)
    console.rule("5  what it gains")
    prompt, context = _prompt(loaded, sizes.prompt), _prompt(loaded, sizes.context)
    latencies, cache = _timed(programs, plans, prompt, context, sizes.repeats, inner)
    result = Result(plan, metrics, latencies, cache, Machine.here())
    _show_latencies(console, result)
    return result


def _recorded(loaded: Loaded, path: Path, sizes: Sizes, console: Console) -> Recording:
    if path.exists():
        recording = Recording.load(path)
        try:
            recording.check(loaded.model)
        except RecordError as error:
            raise RecordError(f"{path}: {error}, or give another folder") from error
        return recording
    batches = batches_of(loaded, python_documentation("record"), sizes.length, sizes.record)
    partial = path.with_name(f"{path.name}.partial")
    recording = record(loaded.model, batches, resume=partial, progress=True, max_tokens=sizes.record)
    recording.save(path)
    partial.unlink(missing_ok=True)
    return recording


def _evaluated(
    loaded: Loaded, programs: Mapping[str, nn.Module], plans: Mapping[str, Plan], sizes: Sizes
) -> dict[str, Metrics]:
    batches = list(batches_of(loaded, python_documentation("hold out"), sizes.length, sizes.evaluate))
    metrics = {}
    with bar("evaluating", "programs", len(programs), True) as advance:
        for name, model in programs.items():
            if name in plans:
                apply(model, plans[name], inner="eager")
            reference = None if name == ORIGINAL else programs[ORIGINAL]
            metrics[name] = evaluate(model, batches, reference, progress=True)
            advance(1)
    return metrics


def _prompt(loaded: Loaded, length: int) -> Tensor:
    (batch,) = batches_of(loaded, python_documentation("hold out"), length, length)
    ids = batch["input_ids"]
    assert isinstance(ids, Tensor)
    return ids


def _timed(
    programs: Mapping[str, nn.Module],
    plans: Mapping[str, Plan],
    prompt: Tensor,
    context: Tensor,
    repeats: int,
    inner: str,
) -> tuple[tuple[Latency, ...], dict[str, float]]:
    held = {name: cache_bytes_per_token(model, prompt) for name, model in programs.items()}
    for name in plans:
        apply(programs[name], Plan(), inner="eager")  # what is dropped stays away; its groups are compiled apart below
    first = programs[ORIGINAL]
    compiled = {name: _compiled(first, None, inner) for name in (ORIGINAL, AGAIN)}
    compiled |= {UNPLANNED: _compiled(first, Plan(), inner)}
    compiled |= {name: _compiled(programs[name], plan, inner) for name, plan in plans.items()}
    prompted = prefill(compiled, prompt, repeats // 2 + 1, progress=True)
    caches = {name: filled_cache(programs.get(name, first), context) for name in compiled}
    return (prompted, decode(compiled, caches, context, repeats, progress=True)), held


def _compiled(model: nn.Module, plan: Plan | None, inner: str) -> Program:
    """The model under ffnfuse, or, without a plan, under ``inner`` alone.

    Apart: programs that share code would be looked up among each other's graphs.
    """
    if plan is None:
        return torch.compile(twin(model), backend=inner, dynamic=False, **APART)
    options: Any = {"plan": plan, "inner": inner}  # torch hands on what its annotation forbids
    return torch.compile(twin(model), backend="ffnfuse", options=options, dynamic=False, **APART)


def _show_metrics(console: Console, metrics: Mapping[str, Metrics]) -> None:
    table = Table("", "perplexity", "95%", "to original", "KL, nats/token", "top-1 agreement")
    base = metrics[ORIGINAL].perplexity
    for name, measured in metrics.items():
        low, high = measured.perplexity_interval
        cells = [f"{measured.perplexity:.2f}", f"{low:.2f} .. {high:.2f}"]
        if name != ORIGINAL:
            cells += [f"{measured.perplexity / base - 1:+.1%}", f"{measured.kl:.3f}", f"{measured.agreement:.1%}"]
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"{metrics[ORIGINAL].tokens:,} tokens of text that was neither recorded nor planned on")


def _show_latencies(console: Console, result: Result) -> None:
    phases = [f"{latencies.phase} ({latencies.tokens} tokens), ms" for latencies in result.latencies]
    table = Table("", *phases, "KV cache, bytes/token")
    for name in result.latencies[0].samples.seconds:
        cells = []
        for latencies in result.latencies:
            ratios = [f"{latencies.samples.ratio(name, base):.3f}" for base in (ORIGINAL, UNPLANNED)]
            cells.append(f"{latencies.samples.median(name) * 1e3:.2f}  ({', '.join(ratios)})")
        table.add_row(name, *cells, f"{result.cache_bytes[name]:,.0f}" if name in result.cache_bytes else "")
    console.print(table)
    console.print(
        f"{result.machine}; in parentheses: time relative to the original, and to it under ffnfuse; medians of rounds"
    )
