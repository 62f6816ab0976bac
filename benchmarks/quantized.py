"""Claim: a plan and quantized weights go together: what both cost is at most the sum of what each costs.

    python benchmarks/quantized.py --json FILE [--configs "int8" ...] [--time [none "int8" ...]]

SmolLM2-135M, its weights quantized by torchao or not, as it is and under a plan: six attentions dropped, eight FFNs in
two groups, unhealed. Size, perplexity and KL to the original on topics of Python's documentation. Planned and quantized
models run as fxfuse fuses them (``inner="eager"``), the gains of the groups folded before (fxfuse.fold_gains).
Embeddings and head, which are one, stay as they are. Sizes are those in memory: torchao keeps int4 in whole bytes where
it has no kernel for it.

``--time`` gives rows of FILE the time of a decode step under inductor, relative to the original's; all take turns, and
the original runs twice. The machine has to be calm, and what is compiled is chosen by measurements, so let
``TORCHINDUCTOR_CACHE_DIR`` name a folder whose graphs were not compiled while it was busy.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

import fxfuse
from fxfuse import Plan
from fxfuse._common.files import check_writable, write_atomically
from fxfuse._torch.apart import APART, twin
from fxfuse.bench.prefill_decode import decode, filled_cache
from fxfuse.bench.timing import Machine
from fxfuse.data.loading import load
from fxfuse.data.text import batches_of, python_documentation
from fxfuse.graph.blocks import inner
from fxfuse.measure.resume import digest_batch

PLAN = Plan(
    drop=[f"model.layers.{index}.self_attn" for index in (5, 6, 7, 25, 26, 27)],
    parallel=[[f"model.layers.{index}.mlp" for index in range(first, first + 4)] for first in (4, 24)],
)
BARE = "none"
CONFIGS: Mapping[str, Callable[[], object]] = {
    "int8": Int8WeightOnlyConfig,
    "int8, inputs too": Int8DynamicActivationInt8WeightConfig,
    "int8, groups of 32": lambda: Int8WeightOnlyConfig(granularity=PerGroup(32)),
    "int4, groups of 32": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


class Bench:
    """The model, the text that judges, and the rows that are done."""

    def __init__(self, tokens: int, length: int, path: Path) -> None:
        self.path = path
        self.loaded = load("smollm2", torch.float32)
        self.model: nn.Module = self.loaded.model.requires_grad_(False)
        self.text = list(batches_of(self.loaded, python_documentation("hold out"), length, tokens, batch=2))
        self.said: dict[str, Any] = {}
        self.held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}

    @property
    def rows(self) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = self.held["rows"]
        return made

    def made(self, config: str, planned: bool) -> tuple[nn.Module, Plan]:
        """A model of its own, its gains folded, quantized and pruned."""
        model, plan = copy.deepcopy(self.model), PLAN if planned else Plan()
        if planned and config != BARE:
            fxfuse.fold_gains(model, plan, **self.text[0])
        if config != BARE:
            quantize_(model, CONFIGS[config](), lambda each, name: isinstance(each, nn.Linear) and "head" not in name)
        return fxfuse.prune(model, plan), plan

    def original(self, **batch: torch.Tensor) -> object:
        """What the original says of a batch, which it is asked once."""
        key = digest_batch(batch)
        if key not in self.said:
            self.said[key] = self.model(**batch)
        return self.said[key]

    def row(self, config: str, planned: bool) -> None:
        if any((row["quantized"], row["planned"]) == (config, planned) for row in self.rows):
            return
        torch.compiler.reset()
        model, plan = self.made(config, planned)
        fused = {branch.fused for branch in fxfuse.explain(model, plan=plan, **self.text[0]).branches}
        run = torch.compile(twin(model), backend="ffnfuse", options={"plan": plan, "inner": "eager"}, **APART)
        metrics = fxfuse.evaluate(run, self.text, reference=self.original)
        row = {
            "quantized": config,
            "planned": planned,
            "fused": next((way for way in ("wide", "gate_up") if way in fused), ""),
            "mb": size(model) / 1e6,
            "perplexity": metrics.perplexity,
            "kl": metrics.kl,
            "tokens": metrics.tokens,
        }
        self.rows.append(row)
        self.save()
        print(row, flush=True)

    def save(self) -> None:
        write_atomically(self.path, (json.dumps(self.held, indent=2) + "\n").encode())

    def time(self, configs: Collection[str], context: int, repeats: int) -> None:
        ids = torch.randint(0, 1000, (1, context), generator=torch.Generator().manual_seed(0))
        rows = [row for row in self.rows[1:] if row["quantized"] in configs]
        print("compiling", flush=True)
        keys = {json.dumps([row["quantized"], row["planned"]]): row for row in rows}
        programs, caches = {}, {}
        for name, row in [("original", self.rows[0]), ("again", self.rows[0]), *keys.items()]:
            torch._dynamo.reset()
            model, plan = self.made(row["quantized"], row["planned"])
            caches[name] = filled_cache(model, ids)
            programs[name] = torch.compile(
                twin(model), backend="ffnfuse", options={"plan": plan}, dynamic=False, **APART
            )
        samples = decode(programs, caches, ids, repeats, progress=True).samples
        self.held["timing"] = {
            "machine": str(Machine.here()),
            "context": context,
            "original_ms": 1e3 * samples.median("original"),
            "original_twice": samples.ratio("again", "original"),
            "void": samples.void("original", "again"),
        }
        for name, row in keys.items():
            row["decode"] = samples.ratio(name, "original")
        self.save()


def size(model: nn.Module) -> int:
    """The bytes of a model's weights; what is tied counts once."""
    held = {(part.data_ptr(), part.nbytes): part for weight in model.parameters() for part in inner(weight)}
    return sum(part.nbytes for part in held.values())


def show(held: Mapping[str, Any]) -> None:
    rows: Sequence[Mapping[str, Any]] = held["rows"]
    print("| weights | plan | groups | MB | perplexity | KL | sum of both KLs | decode |\n" + "|---" * 8 + "|")
    kl = {(row["quantized"], row["planned"]): row["kl"] for row in rows}
    for row in rows:
        both = row["planned"] and row["quantized"] != BARE
        total = f"{kl[row['quantized'], False] + kl[BARE, True]:.4f}" if both else ""
        cells = [row["quantized"], "planned" if row["planned"] else "", row["fused"], f"{row['mb']:.0f}"]
        cells += [f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", total]
        cells += [f"{row['decode']:.3f}" if "decode" in row else ""]
        print(f"| {' | '.join(cells)} |")
    if timing := held.get("timing"):
        print(timing)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the rows; those that are there are not made again")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--time", nargs="*", choices=(BARE, *CONFIGS), help="time these rows of the file, or all")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    check_writable(arguments.json)
    bench = Bench(arguments.tokens, arguments.length, arguments.json)
    for config in (BARE, *arguments.configs):
        for planned in (False, True):
            bench.row(config, planned)
    if arguments.time is not None:
        bench.time(arguments.time or (BARE, *CONFIGS), arguments.context, arguments.repeats)
    show(bench.held)


if __name__ == "__main__":
    main()
