"""Claim: most of what a plan costs comes back, in minutes on two cores, and no text gets worse.

    python benchmarks/healing.py [--drops 3,6,10] [--groups 0,4] [--linear] [--method fit] [--json FILE]

SmolLM2-135M. For each plan (so many attentions of least KL dropped, and so many of the FFNs then next to each other in
groups of two) the perplexity and the KL to the original, unhealed and healed, with ``--linear`` also with linear maps
in place of the dropped attentions. They are measured on two kinds of text that take part in nothing else: "near",
topics of Python's documentation that were not healed on, and "far", licence texts. It is healed on other topics, on
docstrings of the standard library, and on text that the model writes itself.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxfuse
from fxfuse import Plan, Recording
from fxfuse.bench.timing import Machine
from fxfuse.data.loading import load
from fxfuse.data.own_text import written_by
from fxfuse.data.text import batches_of, python_documentation
from fxfuse.measure.planned import Planned

LICENCES = Path("/usr/share/common-licenses")

Batches = Sequence[Mapping[str, object]]


def docstrings() -> str:
    """The longer docstrings of the standard library, each module's after the other."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                found += [text] if len(text) > 200 else []
    return "\n\n".join(found)


def licences() -> str:
    """Licence texts that Debian installs."""
    return "\n".join((LICENCES / name).read_text() for name in ("GPL-3", "Apache-2.0", "MPL-2.0", "GFDL-1.3"))


def plans(recording: Recording, drops: Sequence[int], groups: Sequence[int]) -> list[Plan]:
    """For each number of drops and of groups, the plan of the least recorded KL."""
    made: list[Plan] = []
    for drop in drops:
        plan = fxfuse.make_plan(recording, drop=drop)
        for count in groups:
            made.append(plan if not count else _grouped(plan, count))
    return made


def _grouped(plan: Plan, count: int) -> Plan:
    """The first ``count`` pairs of FFNs that a dropped attention no longer parts, each FFN in one pair."""
    layers = sorted(int(name.split(".")[2]) for name in plan.drop)
    pairs: list[list[str]] = []
    for layer in layers:
        pair = [f"model.layers.{n}.mlp" for n in (layer - 1, layer)]
        if layer and len(pairs) < count and not any(pair[0] in other for other in pairs):
            pairs.append(pair)
    return Plan(drop=plan.drop, parallel=pairs)


def measured(model: nn.Module, original: nn.Module, plan: Plan, texts: Mapping[str, Batches]) -> dict[str, Any]:
    planned = Planned(model)
    planned.plan = plan
    found = {name: fxfuse.evaluate(planned, text, reference=original) for name, text in texts.items()}
    return {name: {"kl": each.kl, "perplexity": each.perplexity} for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drops", default="3,6,10", help="how many attentions are dropped")
    parser.add_argument("--groups", default="0", help="how many pairs of FFNs are fused")
    parser.add_argument("--linear", action="store_true", help="also with linear maps in place of the attentions")
    parser.add_argument("--method", default="fit")
    parser.add_argument("--tokens", type=int, default=16384, help="of each kind of text")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    method: list[Any] = arguments.method.split(",")
    loaded = load("smollm2", torch.float32)
    model, length = loaded.model, arguments.length

    def batches(text: str, tokens: int) -> Batches:
        return list(batches_of(loaded, text, length, tokens, batch=2))

    judges = {"near": batches(python_documentation("hold out"), 8192), "far": batches(licences(), 8192)}
    texts = {
        "documentation": batches(python_documentation("record"), arguments.tokens),
        "docstrings": batches(docstrings(), arguments.tokens),
        "own": written_by(model, arguments.tokens, length, progress=True),
    }
    recording = fxfuse.record(model, batches(python_documentation("plan"), 2048), max_group=0, progress=True)
    rows: list[dict[str, Any]] = []
    numbers = [[int(each) for each in text.split(",")] for text in (arguments.drops, arguments.groups)]
    print(Machine.here())
    print(f"{'drops':>5} {'groups':>6} {'':8} {'KL near':>8} {'KL far':>8} {'ppl near':>8} {'ppl far':>8}")
    original = measured(model, model, Plan(), judges)
    _show("", "", "original", original)
    for plan in plans(recording, *numbers):
        before = measured(model, model, plan, judges)
        _show(len(plan.drop), len(plan.parallel), "unhealed", before)
        mapped = [Plan(linear=plan.drop, parallel=plan.parallel)] if arguments.linear else []
        for which, edits in zip(("healed", "linear"), [plan, *mapped], strict=False):
            student = copy.deepcopy(model)
            healing = fxfuse.heal(student, edits, texts, method, progress=True)
            after = measured(student, model, edits, judges)
            back = {name: 1 - after[name]["kl"] / before[name]["kl"] for name in judges}
            note = f"{back['near']:4.0%} and {back['far']:4.0%} back, {healing.seconds:.0f} s, {healing.share:.0%} kept"
            _show("", "", which, after, note)
            rows.append(
                {
                    "plan": json.loads(edits.to_json()),
                    "method": arguments.method,
                    "unhealed": before,
                    "healed": after,
                    "back": back,
                    "seconds": healing.seconds,
                    "share": healing.share,
                }
            )
            if arguments.json:
                found = {"machine": str(Machine.here()), "tokens": arguments.tokens, "original": original, "rows": rows}
                arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def _show(drops: object, groups: object, which: str, found: Mapping[str, Any], note: str = "") -> None:
    numbers = [found[name][key] for key in ("kl", "perplexity") for name in ("near", "far")]
    print(f"{drops:>5} {groups:>6} {which:8} " + " ".join(f"{n:8.3f}" for n in numbers) + f"  {note}", flush=True)


if __name__ == "__main__":
    main()
