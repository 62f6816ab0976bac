"""Claim: most of what a plan costs comes back, in minutes on two cores, and no text gets worse.

    python benchmarks/healing.py --json FILE [--plans 3 6 6+3 9 9+4 12 6L] [--how fit "linear, fit" NBL] [--time]

SmolLM2-135M. For each plan the perplexity and the KL to the original, unhealed, and healed in several ways. A plan 6+3
drops the six attentions of least recorded KL and fuses three pairs of the FFNs that are then neighbours; one with L
takes the attentions that cost least, each alone, as linear maps; "half" and the like are those that engines serve
(serving/plans.py). They are measured on two kinds of text that take part in nothing else: "near", topics of Python's
documentation that were not healed on, and "far", licence texts. It is healed on other topics, on docstrings of the
standard library, and on text that the model writes itself.

``--how`` names methods of heal, "linear, " before those that put linear maps in the attentions' places, and peers that
do with as many attentions what they do in closed form (healing_peers.py). ``--time`` compiles the plans of FILE and
times decode steps; with ``--costs``, where none was timed, the table has ~ and what they take as measured branches add
up. FILE is written after each row; the same command goes on where it was. What comes back is compared with the
attentions dropped. Minutes hold for a machine with other work on it, where ``load`` is above 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from healing_peers import linear_maps, nbl, skip
from safetensors.torch import load_file, save
from serving.plans import PLANS
from torch import Tensor, nn

import fxfuse
from fxfuse import Plan
from fxfuse._common.files import check_writable, write_atomically
from fxfuse._torch.apart import APART, twin
from fxfuse.bench.prefill_decode import decode, filled_cache
from fxfuse.bench.timing import Machine
from fxfuse.data.loading import load
from fxfuse.data.own_text import written_by
from fxfuse.data.text import batches_of, docstrings, python_documentation
from fxfuse.measure.planned import Planned
from fxfuse.planning import Costs

LICENCES = Path("/usr/share/common-licenses")

PEERS = ("NBL", "ReplaceMe", "LinearPatch")

Batches = Sequence[Mapping[str, object]]


def licences() -> str:
    """Licence texts that Debian installs."""
    return "\n".join((LICENCES / name).read_text() for name in ("GPL-3", "Apache-2.0", "MPL-2.0", "GFDL-1.3"))


def grouped(plan: Plan, count: int) -> Plan:
    """``plan`` with the first ``count`` pairs of FFNs that a dropped attention no longer parts, no FFN in two."""
    pairs: list[list[str]] = []
    for layer in sorted(layer_of(name) for name in plan.drop):
        pair = [f"model.layers.{n}.mlp" for n in (layer - 1, layer)]
        if layer and len(pairs) < count and not any(pair[0] in other for other in pairs):
            pairs.append(pair)
    return Plan(drop=plan.drop, parallel=pairs)


def layer_of(name: str) -> int:
    return int(name.split(".")[2])


def judged(
    student: nn.Module, reference: nn.Module, plan: Plan, judges: Mapping[str, Batches]
) -> dict[str, dict[str, float | None]]:
    """KL to ``reference``, and perplexity, of ``student`` under ``plan``, on each kind of text."""
    planned = Planned(student)
    planned.plan = plan
    found = {name: fxfuse.evaluate(planned, text, reference=reference) for name, text in judges.items()}
    return {name: {"kl": metrics.kl, "perplexity": metrics.perplexity} for name, metrics in found.items()}


@dataclass(frozen=True)
class Sizes:
    """Tokens: of each kind of text healed on, of each judged on, recorded, in a sequence."""

    heal: int
    judge: int
    record: int
    length: int


class Bench:
    """The model, the texts, and the rows that are done."""

    def __init__(self, sizes: Sizes, path: Path, times: Costs | None) -> None:
        self.sizes, self.path, self.times = sizes, path, times
        self.loaded = load("smollm2", torch.float32)
        self.model: nn.Module = self.loaded.model
        made = json.loads(path.read_text()) if path.exists() else {}
        if made and made["sizes"] != asdict(sizes):
            raise SystemExit(f"{path} was made with {made['sizes']}: give these again, or another file")
        self.rows: list[dict[str, Any]] = made.get("rows", [])

    def batches(self, text: str, tokens: int) -> Batches:
        return list(batches_of(self.loaded, text, self.sizes.length, tokens, batch=2))

    @cached_property
    def judges(self) -> Mapping[str, Batches]:
        texts = {"near": python_documentation("hold out"), "far": licences()}
        return {name: self.batches(text, self.sizes.judge) for name, text in texts.items()}

    @cached_property
    def texts(self) -> Mapping[str, Batches]:
        return {
            "documentation": self.batches(python_documentation("record"), self.sizes.heal),
            "docstrings": self.batches(docstrings(), self.sizes.heal),
            "own": self.own,
        }

    @cached_property
    def own(self) -> Batches:
        """Text that the model has written, once for all runs."""
        path = self.path.with_suffix(".own.safetensors")
        if not path.exists():
            written = written_by(self.model, self.sizes.heal, self.sizes.length, progress=True)
            rows = {
                f"{number:04}.{name}": value for number, batch in enumerate(written) for name, value in batch.items()
            }
            write_atomically(path, save({name: value for name, value in rows.items() if isinstance(value, Tensor)}))
        batches: dict[str, dict[str, object]] = {}
        for key, value in load_file(path).items():
            number, _, name = key.partition(".")
            batches.setdefault(number, {"use_cache": False})[name] = value
        return [batches[number] for number in sorted(batches)]

    @cached_property
    def recording(self) -> fxfuse.Recording:
        path = self.path.with_suffix(".recording.safetensors")
        if not path.exists():
            text = self.batches(python_documentation("plan"), self.sizes.record)
            fxfuse.record(self.model, text, max_group=0, progress=True).save(path)
        return fxfuse.Recording.load(path)

    @cached_property
    def costs(self) -> dict[str, float]:
        """KL with the attention of each layer alone as a linear map, on topics that neither fit nor judge."""
        path = self.path.with_suffix(".costs.json")
        if not path.exists():
            model: Any = self.model
            text = self.batches(python_documentation("plan"), self.sizes.record)
            fitted = [batch for kind in ("documentation", "docstrings") for batch in self.texts[kind]]
            student, costs = copy.deepcopy(model), dict[str, float]()
            for layer, made in linear_maps(model, range(len(model.model.layers)), fitted).items():
                block = student.model.layers[layer]
                block.self_attn, attention = made, block.self_attn
                costs[str(layer)] = float(fxfuse.evaluate(student, text, reference=model).kl or 0)
                block.self_attn = attention
            write_atomically(path, json.dumps(costs).encode())
        made_before: dict[str, float] = json.loads(path.read_text())
        return made_before

    def plan(self, name: str) -> Plan:
        """The plan that ``name`` says: 6+3 drops six attentions and fuses three pairs; or one that engines serve."""
        if name in PLANS:
            return PLANS[name]
        drops, _, pairs = name.partition("+")
        if drops.endswith("L"):
            cheapest = sorted(self.costs, key=self.costs.__getitem__)[: int(drops[:-1])]
            plan = Plan(drop=[f"model.layers.{layer}.self_attn" for layer in sorted(map(int, cheapest))])
        else:
            plan = fxfuse.make_plan(self.recording, drop=int(drops))
        return grouped(plan, int(pairs or 0))

    def judge(self, student: nn.Module, plan: Plan) -> dict[str, dict[str, float | None]]:
        return judged(student, self.model, plan, self.judges)

    def row(self, plan: str, how: str) -> dict[str, Any]:
        """The row, made now if it is not there yet."""
        row = next((row for row in self.rows if (row["plan"], row["how"]) == (plan, how)), None)
        if row is None:
            row = {"plan": plan, "how": how, **self.measured(plan, how)}
            self.rows.append(row)
            self.save()
        self.show(row)
        return row

    def measured(self, name: str, how: str) -> dict[str, Any]:
        started = time.monotonic()
        if how == "original":
            return self.judge(self.model, Plan())
        plan = self.plan(name)
        layers = sorted(layer_of(attention) for attention in plan.drop)
        text = [batch for kind in self.texts.values() for batch in kind] if how in PEERS else []
        more: dict[str, Any] = {}
        if how == "NBL":
            student, plan = nbl(self.model, layers, text), Plan()
        elif how in PEERS:
            student, plan = skip(self.model, len(layers), text, how.lower()), Plan()
        else:
            _, linear, method = how.rpartition("linear, ")
            plan = Plan(linear=plan.drop, parallel=plan.parallel) if linear else plan
            student = copy.deepcopy(self.model)
            if method != "unhealed":
                healing: Any = fxfuse.heal(student, plan, self.texts, method.split(","), progress=True)
                more["share"] = healing.share
            more["edits"] = json.loads(plan.to_json())
        minutes = (time.monotonic() - started) / 60
        return {**self.judge(student, plan), **more, "minutes": minutes, "load": Machine.here().load}

    def save(self) -> None:
        made = {"machine": str(Machine.here()), "sizes": asdict(self.sizes), "rows": self.rows}
        write_atomically(self.path, (json.dumps(made, indent=2) + "\n").encode())

    def show(self, row: Mapping[str, Any]) -> None:
        unhealed = next((each for each in self.rows if (each["plan"], each["how"]) == (row["plan"], "unhealed")), row)
        numbers = [row[text][key] for key in ("kl", "perplexity") for text in ("near", "far")]
        cells = [row["plan"], row["how"], *(f"{number:.3f}" for number in numbers)]
        healed = row["how"] not in ("original", "unhealed")
        cells += [f"{1 - row[text]['kl'] / unhealed[text]['kl']:.0%}" if healed else "" for text in ("near", "far")]
        cells += [f"{row['minutes']:.0f}" if healed else "", self.decode(row)]
        print(f"| {' | '.join(cells)} |", flush=True)

    def decode(self, row: Mapping[str, Any]) -> str:
        """What a decode step takes under the plan of a row, as a share of the model's without one."""
        if "decode" in row or "edits" not in row or self.times is None:
            return f"{row['decode']:.3f}" if "decode" in row else ""
        return f"~{self.times.of(Plan.model_validate(row['edits'])).seconds / self.times.whole:.3f}"

    def time(self, context: int, repeats: int) -> None:
        """Give each row with edits the time of a decode step, relative to the model's without a plan."""
        ids = torch.randint(0, 1000, (1, context), generator=torch.Generator().manual_seed(0))
        timed = {json.dumps(row["edits"]): row["edits"] for row in self.rows if "edits" in row and "decode" not in row}
        for key, edits in timed.items():
            torch._dynamo.reset()
            plans = {"original": Plan(), "again": Plan(), "planned": Plan.model_validate(edits)}
            models = {name: fxfuse.prune(copy.deepcopy(self.model), plan) for name, plan in plans.items()}
            programs = {
                name: torch.compile(
                    twin(model), backend="ffnfuse", options={"plan": plans[name]}, dynamic=False, **APART
                )
                for name, model in models.items()
            }
            caches = {name: filled_cache(model, ids) for name, model in models.items()}
            samples = decode(programs, caches, ids, repeats, progress=True).samples
            for row in self.rows:
                if json.dumps(row.get("edits")) == key and not samples.void("original", "again"):
                    row |= {"decode": samples.ratio("planned", "original"), "context": context}
            self.save()


def wanted(plans: Sequence[str], ways: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The rows, by plan and by how it is healed; peers know no groups."""
    yield "", "original"
    for plan in plans:
        yield plan, "unhealed"
        yield from ((plan, how) for how in ways if how not in PEERS or "+" not in plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the rows; those that are there are not made again")
    parser.add_argument("--plans", nargs="+", default=["3", "6", "6+3", "9", "9+4", "12", "6L"])
    parser.add_argument("--how", nargs="+", default=["fit", "linear, fit", *PEERS])
    parser.add_argument("--time", action="store_true", help="time the plans of the file; the machine has to be calm")
    parser.add_argument("--costs", type=Path, help="of branches, as results/costs_smollm2.json, for what is not timed")
    parser.add_argument("--tokens", type=int, default=16384, help="of each of three kinds of text to heal on")
    parser.add_argument("--judge", type=int, default=8192, help="tokens of each text that judges")
    parser.add_argument("--record", type=int, default=2048, help="tokens to record")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    check_writable(arguments.json)
    sizes = Sizes(arguments.tokens, arguments.judge, arguments.record, arguments.length)
    bench = Bench(sizes, arguments.json, None if arguments.costs is None else Costs.load(arguments.costs))
    print(Machine.here())
    print("| plan | | KL near | KL far | perplexity near | far | back near | far | minutes | decode |")
    print("|---" * 10 + "|")
    if arguments.time:
        bench.time(arguments.context, arguments.repeats)
    for plan, how in wanted(arguments.plans, arguments.how):
        bench.row(plan, how)


if __name__ == "__main__":
    main()
