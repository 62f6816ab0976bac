"""The demo: a model recorded, planned for a decode latency, healed, judged and timed, and all of that in files."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxfuse
from fxfuse import Plan, Recording
from fxfuse._common.files import write_atomically
from fxfuse._common.progress import bar
from fxfuse._torch.apart import APART, twin
from fxfuse.bench.prefill_decode import Latency, Program, cache_bytes_per_token, decode, filled_cache, prefill
from fxfuse.bench.timing import Machine
from fxfuse.cli.shared import save_folder
from fxfuse.data.batches import Batch, Model
from fxfuse.data.loading import Loaded
from fxfuse.data.own_text import written_by
from fxfuse.data.text import batches_of, docstrings, licences, python_documentation
from fxfuse.errors import HealError, RecordError
from fxfuse.measure.evaluation import Metrics
from fxfuse.measure.planned import Planned
from fxfuse.planning import Costs, Effort, Search, Targets, find_plan, measure_costs
from fxfuse.planning.text import prompt
from fxfuse.report import save_report
from fxfuse.report.page import load_results

ORIGINAL, AGAIN, UNPLANNED = "original", "original, compiled again", "original under ffnfuse"
PLANNED, HEALED = "planned", "planned and healed"

NEAR, FAR = "near", "far"

FILES = ("recording.safetensors", "costs.json", "plan.json", "search.json", "report.html")

Kinds = Mapping[str, Sequence[Batch]]


@dataclass(frozen=True)
class Sizes:
    """How much of everything: the defaults take fifteen minutes for a model of 135M parameters on two cores.

    Attributes:
        length: tokens in a sequence.
        record, search, heal, own, judge: tokens to record on; to search on; to heal on, of each of two kinds, and of
            what the model writes itself; to judge by, of each of two other kinds.
        prompt: tokens of the prefill that is timed.
        context: tokens in the KV cache of the decode step that is timed.
        repeats: rounds of timing.
        effort: how long to search.
    """

    length: int = 256
    record: int = 1024
    search: int = 512
    heal: int = 8192
    own: int = 2048
    judge: int = 3072
    prompt: int = 128
    context: int = 2048
    repeats: int = 21
    effort: Effort = field(default_factory=lambda: Effort(pool=3, healed=1, patience=1, minutes=4, heal_tokens=2560))


@dataclass(frozen=True)
class Result:
    """What the demo found.

    Attributes:
        search: the plans that were tried, and the best of them.
        metrics: of each program, by the kind of text.
        latencies: prefill and decode; of the original, compiled twice by the inner compiler and once by ffnfuse, and of
            the planned model.
        cache_bytes: of keys and values a token costs, by program.
        machine: where.
    """

    search: Search
    metrics: Mapping[str, Mapping[str, Metrics]]
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
            f"{latency.phase}, {latency.tokens} tokens": {
                name: {
                    "median_seconds": latency.samples.median(name),
                    "to_original": latency.samples.ratio(name, ORIGINAL),
                }
                for name in latency.samples.seconds
            }
            for latency in self.latencies
        }
        metrics = {
            name: {kind: json.loads(each.to_json()) for kind, each in kinds.items()}
            for name, kinds in self.metrics.items()
        }
        data = {"machine": str(self.machine), "search": json.loads(self.search.to_json()), "metrics": metrics}
        data |= {"latency": times, "latency_void": self.void, "cache_bytes_per_token": dict(self.cache_bytes)}
        return json.dumps(data, indent=2)


def run(loaded: Loaded, folder: Path, target: float, sizes: Sizes, console: Console, inner: str = "inductor") -> Result:
    """Run the whole demo; writes ``FILES`` and the healed model, ``healed/``, to ``folder``.

    An interrupted demo goes on where it was: what is there already of this model is used again.

    Args:
        loaded: a Hugging Face model, and its tokenizer.
        folder: where the files go.
        target: share of the original's decode time that the plan may take.
        sizes: how much of everything.
        console: where to show it.
        inner: the compiler.

    Raises:
        FxfuseError: whatever stands in the way.
    """
    model = loaded.model.eval()
    texts = _Texts(loaded, sizes)
    console.rule("1  what is in the model")
    console.print(str(fxfuse.explain(model, *loaded.args, plan=None, **loaded.kwargs)), markup=False, highlight=False)
    console.rule("2  which branches depend on which")
    recording = _recorded(model, folder / "recording.safetensors", texts, sizes)
    console.print(f"{recording.tokens:,} tokens")
    console.rule("3  what each branch costs")
    costs = _measured(model, folder / "costs.json", texts, sizes, inner)
    console.print(_told(costs), markup=False, highlight=False)
    console.rule(f"4  the plan of least KL that decodes in {target:.0%} of the time")
    state = folder / "search.state"
    search = find_plan(
        recording,
        model,
        texts.searched,
        Targets(latency=target),
        costs,
        heal_on=texts.healed,
        effort=sizes.effort,
        resume=state,
        progress=True,
    )
    search.plan.save(folder / "plan.json")
    write_atomically(folder / "search.json", (json.dumps(search.results(), indent=2) + "\n").encode())
    save_report(recording, folder / "report.html", search.plan, load_results(folder / "search.json"))
    console.print(str(search), markup=False, highlight=False)
    console.rule("5  its quality back")
    healed = copy.deepcopy(model)
    notes = folder / "healing"
    healing = fxfuse.heal(healed, search.plan, texts.healed, "fit", resume=notes, progress=True)
    console.print(str(healing), markup=False, highlight=False)
    if not healing.share:
        raise HealError(f"nothing heals this plan: ask for less than --target-latency {target}")
    shutil.rmtree(folder / "healed", ignore_errors=True)
    save_folder(healed, loaded.tokenizer, search.plan, folder / "healed")
    console.rule("6  what it costs, on text that took no part, and what it gains")
    metrics = _judged(model, healed, search.plan, texts.judged)
    latencies, cache = _timed(model, healed, search.plan, texts, sizes, inner)
    result = Result(search, metrics, latencies, cache, Machine.here())
    _show(console, result)
    state.unlink(missing_ok=True)
    shutil.rmtree(notes, ignore_errors=True)
    return result


class _Texts:
    """Batches for each purpose: no two share a sequence."""

    def __init__(self, loaded: Loaded, sizes: Sizes) -> None:
        self._loaded, self._length = loaded, sizes.length
        documentation = self._batches(python_documentation("record"), sizes.record + sizes.heal)
        taken = -(-sizes.record // (2 * sizes.length))
        self.recorded = documentation[:taken]
        self.searched = self._batches(python_documentation("plan"), sizes.search)
        self.healed: Kinds = {
            "documentation": documentation[taken:],
            "docstrings": self._batches(docstrings(), sizes.heal),
            "own text": written_by(loaded.model, sizes.own, sizes.length, progress=True),
        }
        self.judged: Kinds = {
            NEAR: self._batches(python_documentation("hold out"), sizes.judge),
            FAR: self._batches(licences(), sizes.judge),
        }

    def _batches(self, text: str, tokens: int) -> list[dict[str, object]]:
        return list(batches_of(self._loaded, text, self._length, tokens, batch=2))

    def prompt(self, length: int) -> Tensor:
        """The beginning of a text that took no part, ``[1, length]``."""
        return prompt(self.judged[NEAR], length)


def _recorded(model: nn.Module, path: Path, texts: _Texts, sizes: Sizes) -> Recording:
    if path.exists():
        recording = Recording.load(path)
        try:
            recording.check(model)
        except RecordError as error:
            raise RecordError(f"{path}: {error}, or give another folder") from error
        return recording
    partial = path.with_name(f"{path.name}.partial")
    recording = fxfuse.record(
        model, texts.recorded, resume=partial, max_tokens=sizes.record, max_group=0, progress=True
    )
    recording.save(path)
    partial.unlink(missing_ok=True)
    return recording


def _measured(model: nn.Module, path: Path, texts: _Texts, sizes: Sizes, inner: str) -> Costs:
    if path.exists():
        return Costs.load(path)
    costs = measure_costs(model, texts.prompt(sizes.context), inner=inner, progress=True)
    costs.save(path)
    return costs


def _told(costs: Costs) -> str:
    """What the dearest branch of each kind takes, and all of them."""
    times = {branch.name: branch.seconds for branch in costs.branches}
    dearest = max(times, key=times.__getitem__)
    return (
        f"a decode step after {costs.context:,} tokens takes {costs.whole * 1e3:.1f} ms, "
        f"{sum(times.values()) / costs.whole:.0%} of it in {len(times)} branches; {dearest} takes "
        f"{times[dearest] * 1e3:.2f} ms ({costs.where})"
    )


def _judged(model: nn.Module, healed: nn.Module, plan: Plan, kinds: Kinds) -> dict[str, dict[str, Metrics]]:
    """The original; it under the plan; the healed one. Unhealed there are no linear maps, so their attentions leave."""
    before, after = Planned(model), Planned(healed)
    left = {"drop": (*plan.drop, *plan.linear), "narrow": plan.narrow, "parallel": _without(plan)}
    before.plan, after.plan = Plan(**left), plan
    programs: dict[str, Model] = {ORIGINAL: model, PLANNED: before, HEALED: after}
    made: dict[str, dict[str, Metrics]] = {name: {} for name in programs}
    with bar("evaluating", "texts", len(programs) * len(kinds), True) as advance:
        for name, program in programs.items():
            for kind, batches in kinds.items():
                made[name][kind] = fxfuse.evaluate(program, batches, None if name == ORIGINAL else model)
                advance(1)
    return made


def _without(plan: Plan) -> list[tuple[Any, ...]]:
    """The groups of a plan without its linear branches."""
    groups = [tuple(member for member in group if member not in plan.linear) for group in plan.parallel]
    return [group for group in groups if len(group) > 1]


def _timed(
    model: nn.Module, healed: nn.Module, plan: Plan, texts: _Texts, sizes: Sizes, inner: str
) -> tuple[tuple[Latency, ...], dict[str, float]]:
    """The original, twice, and the planned model; healing changes no time."""
    ids, context = texts.prompt(sizes.prompt), texts.prompt(sizes.context)
    models = {ORIGINAL: model, AGAIN: model, UNPLANNED: model, HEALED: fxfuse.prune(healed, plan)}
    plans = {UNPLANNED: Plan(), HEALED: plan}
    held = {name: cache_bytes_per_token(models[name], ids) for name in (ORIGINAL, HEALED)}
    programs = {name: _compiled(each, plans.get(name), inner) for name, each in models.items()}
    prompted = prefill(programs, ids, sizes.repeats, progress=True)
    caches = {name: filled_cache(each, context) for name, each in models.items()}
    return (prompted, decode(programs, caches, context, sizes.repeats, progress=True)), held


def _compiled(model: nn.Module, plan: Plan | None, inner: str) -> Program:
    """The model under ffnfuse, or, without a plan, under ``inner`` alone.

    Apart: programs that share code would be looked up among each other's graphs.
    """
    if plan is None:
        return torch.compile(twin(model), backend=inner, dynamic=False, **APART)
    options: Any = {"plan": plan, "inner": inner}  # torch hands on what its annotation forbids
    return torch.compile(twin(model), backend="ffnfuse", options=options, dynamic=False, **APART)


def _quality(metrics: Mapping[str, Mapping[str, Metrics]], name: str, kind: str) -> tuple[str, str]:
    """Perplexity and KL of a program, as a table shows them."""
    if name not in metrics:
        return "", ""
    own, base = metrics[name][kind], metrics[ORIGINAL][kind]
    if name == ORIGINAL:
        return f"{own.perplexity:.2f}", ""
    return f"{own.perplexity:.2f} ({own.perplexity / base.perplexity - 1:+.1%})", f"{own.kl:.3f}"


def _show(console: Console, result: Result) -> None:
    """One table: quality, time and memory of the original, of the plan, and of the healed plan."""
    times = [f"{latency.phase} after {latency.tokens:,}, ms" for latency in result.latencies]
    times[0] = f"prefill of {result.latencies[0].tokens:,}, ms"
    kinds = [f"{what}, {kind}" for kind in (NEAR, FAR) for what in ("perplexity", "KL")]
    table = Table("", *kinds, *times, "KV cache, bytes/token")
    for name in (ORIGINAL, UNPLANNED, PLANNED, HEALED):
        cells: list[str] = []
        for kind in (NEAR, FAR):
            cells += _quality(result.metrics, name, kind)
        for latency in result.latencies:
            timed = name in latency.samples.seconds
            share = "" if name == ORIGINAL or not timed else f" ({latency.samples.ratio(name, ORIGINAL):.3f})"
            cells.append(f"{latency.samples.median(name) * 1e3:.2f}{share}" if timed else "")
        table.add_row(name, *cells, f"{result.cache_bytes[name]:,.0f}" if name in result.cache_bytes else "")
    console.print(table)
    apart = max(abs(latency.samples.ratio(AGAIN, ORIGINAL) - 1) for latency in result.latencies)
    console.print(
        f"{result.metrics[ORIGINAL][NEAR].tokens:,} tokens of each: {NEAR}, documentation of Python, as it was healed "
        f"on; {FAR}, licences. In parentheses: relative to the original; compiled again, it differs by {apart:.1%}. "
        f"{result.machine}"
    )
