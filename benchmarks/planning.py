"""Claim: at equal time saved our solver's plan loses no more KL than those of five rules from the literature.

    python benchmarks/planning.py [--targets 0.95,0.9,0.8] [--solvers NAME...] [--no-heal] [--costs FILE] [--json FILE]

SmolLM2-135M. Text is split four ways: recorded on, searched on, healed on, and judged on; the last in two kinds, "near"
(topics of Python's documentation that nothing else has seen) and "far" (licence texts). What branches cost is measured
for a decode step after ``--context`` tokens, and what a plan saves is their sum, for all solvers alike. Each rule gives
the first of its plans that saves enough; ours is what ``find_plan`` finds, without healing in its search and, in a row
of its own, with. All are healed by the same fit on the same text. Whole blocks in parallel save nothing on one device,
so that rule reaches no target here. The JSON is written after each row; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from healing import Batches, judged, licences
from torch import nn

import fxfuse
from fxfuse import Plan, Recording
from fxfuse._common.files import write_atomically
from fxfuse.bench.timing import Machine
from fxfuse.data.loading import load
from fxfuse.data.text import batches_of, docstrings, python_documentation
from fxfuse.errors import OptionError
from fxfuse.measure.influence import block_influence
from fxfuse.planning import Costs, Effort, Targets, find_plan, measure_costs
from fxfuse.planning.blocks import block_runs
from fxfuse.planning.found import shape
from fxfuse.planning.modelled import model_costs
from fxfuse.planning.solvers import LADDERS, Ladder, first_within
from fxfuse.planning.solvers.ladders import short_gpt
from fxfuse.planning.text import prompt

OURS, HEALED = "fxfuse", "fxfuse, healed search"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="0.95,0.9,0.85,0.8,0.7", help="shares of the original's time")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--record", type=int, default=1024, help="tokens recorded on")
    parser.add_argument("--search", type=int, default=1024, help="tokens searched on")
    parser.add_argument("--heal", type=int, default=16384, help="tokens of each kind healed on")
    parser.add_argument("--judge", type=int, default=8192, help="tokens of each kind judged on")
    parser.add_argument("--pool", type=int, default=6)
    parser.add_argument("--patience", type=int, default=6)
    parser.add_argument("--minutes", type=float, help="after which a search tries nothing new, for each target")
    parser.add_argument("--no-heal", action="store_true")
    parser.add_argument("--solvers", nargs="+", metavar="NAME", help="these alone, of the names in the table")
    parser.add_argument("--device", help="a GPU whose modelled costs are taken, as h100; nothing is timed then")
    parser.add_argument("--costs", type=Path, help="costs that were measured before; written there if there are none")
    parser.add_argument(
        "--folder", type=Path, default=Path("planning"), help="for what an interrupted run goes on from"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    loaded = load("smollm2", torch.float32)
    model, length = loaded.model, arguments.length
    arguments.folder.mkdir(exist_ok=True)

    def batches(text: str, tokens: int) -> Batches:
        return list(batches_of(loaded, text, length, tokens, batch=2))

    searched = batches(python_documentation("plan"), arguments.search)
    judges = {
        "near": batches(python_documentation("hold out"), arguments.judge),
        "far": batches(licences(), arguments.judge),
    }
    # "record" is the largest part of the documentation: its end is healed on, its beginning recorded.
    documentation = batches(python_documentation("record"), arguments.heal + arguments.record)
    first = -(-arguments.record // (2 * length))
    recorded, rest = documentation[:first], documentation[first:]
    heal_on = {} if arguments.no_heal else {"documentation": rest, "docstrings": batches(docstrings(), arguments.heal)}
    recording = _recording(model, recorded, arguments.folder / "recording.safetensors", arguments.record)
    costs = _costs(model, searched, arguments)
    influence = block_influence(model, recorded, [block for run in block_runs(recording) for block in run])
    ladders: dict[str, Ladder] = {**LADDERS, "ShortGPT": partial(short_gpt, influence=influence)}
    effort = Effort(pool=arguments.pool, patience=arguments.patience, minutes=arguments.minutes)
    rows = _made(arguments)
    print(Machine.here())
    print(f"costs: {costs.where}, A/A {costs.apart:.1%}{', void' if costs.void else ''}")
    print(f"{'target':>6} {'solver':24} {'time':>6}  {'unhealed near, far':>18}  {'healed near, far':>18}  plan")
    for target in [float(each) for each in arguments.targets.split(",")]:
        most = target * costs.whole
        ours = partial(_ours, recording, model, searched, Targets(latency=target), costs, effort, arguments.folder)
        made: dict[str, Callable[[], Plan | None]] = {OURS: partial(ours, {})}
        made |= {HEALED: partial(ours, heal_on)} if heal_on else {}
        made |= {
            name: partial(first_within, ladder(recording), lambda plan: costs.of(plan).seconds, most)
            for name, ladder in ladders.items()
        }
        if unknown := {*(arguments.solvers or ())} - {*made}:
            parser.error(f"no solver is called {', '.join(sorted(unknown))}; there are {', '.join(made)}")
        for name in arguments.solvers or made:
            if not any((row["target"], row["solver"]) == (target, name) for row in rows):
                rows.append(_row(target, name, made[name](), model, costs, judges, heal_on))
                if arguments.json:
                    _write(arguments, rows, costs)


def _recording(model: nn.Module, batches: Batches, path: Path, tokens: int) -> Recording:
    if path.exists():
        recording = Recording.load(path)
        recording.check(model)
        return recording
    recording = fxfuse.record(model, batches, max_group=0, max_tokens=tokens, progress=True)
    recording.save(path)
    return recording


def _costs(model: nn.Module, batches: Batches, arguments: argparse.Namespace) -> Costs:
    if arguments.device is not None:
        return model_costs(model, arguments.device, context=arguments.context)
    if arguments.costs is not None and arguments.costs.exists():
        return Costs.load(arguments.costs)
    costs = measure_costs(model, prompt(batches, arguments.context), progress=True)
    if arguments.costs is not None:
        costs.save(arguments.costs)
    return costs


def _ours(
    recording: Recording,
    model: nn.Module,
    batches: Batches,
    targets: Targets,
    costs: Costs,
    effort: Effort,
    folder: Path,
    heal_on: Mapping[str, Batches],
) -> Plan | None:
    state = folder / "search.state"  # one for all targets: edits are measured once
    try:
        found = find_plan(
            recording, model, batches, targets, costs, heal_on=heal_on, effort=effort, resume=state, progress=True
        )
    except OptionError as error:
        print(error)
        return None
    print(found)
    return found.plan


def _row(
    target: float,
    name: str,
    plan: Plan | None,
    model: nn.Module,
    costs: Costs,
    judges: Mapping[str, Batches],
    heal_on: Mapping[str, Sequence[Mapping[str, object]]],
) -> dict[str, Any]:
    if plan is None:
        print(f"{target:6.0%} {name:24} does not reach it", flush=True)
        return {"target": target, "solver": name, "plan": None}
    # Unhealed, an attention made linear holds no map yet: it is as if it had left.
    before = judged(
        model, model, Plan(drop=(*plan.drop, *plan.linear), narrow=plan.narrow, parallel=plan.parallel), judges
    )
    after = None
    if heal_on:
        student = copy.deepcopy(model)
        fxfuse.heal(student, plan, heal_on, "fit", progress=True)
        after = judged(student, model, plan, judges)
    share = costs.of(plan).seconds / costs.whole
    numbers = [f"{kl['near']['kl']:8.4f}, {kl['far']['kl']:8.4f}" if kl else "" for kl in (before, after)]
    print(f"{target:6.0%} {name:24} {share:6.1%}  {numbers[0]:>18}  {numbers[1]:>18}  {shape(plan)}", flush=True)
    found = {"target": target, "solver": name, "time": share, "unhealed": before, "healed": after}
    return {**found, "plan": json.loads(plan.model_copy(update={"why": ()}).to_json())}


def _tokens(arguments: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(arguments, name) for name in ("record", "search", "heal", "judge")}


def _made(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that an earlier run has made."""
    if arguments.json is None or not arguments.json.exists():
        return []
    found = json.loads(arguments.json.read_text())
    if found["tokens"] != _tokens(arguments):
        raise SystemExit(f"{arguments.json} was made with {found['tokens']} tokens: give these, or another file")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def _write(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]], costs: Costs) -> None:
    found = {
        "machine": str(Machine.here()),
        "tokens": _tokens(arguments),
        "costs": {"where": costs.where, "apart": costs.apart, "void": costs.void, "context": costs.context},
        "rows": rows,
    }
    write_atomically(arguments.json, (json.dumps(found, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
