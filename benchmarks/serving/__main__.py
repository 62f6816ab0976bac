"""Claim: engines serve SmolLM2-135M under a plan faster than as it is: first token, and each token after it.

    python -m benchmarks.serving --python VLLM_PYTHON [--plans fused pairs blocks] [--compiled] [--json FILE]
    python -m benchmarks.serving --llama-python LLAMA_PYTHON --kinds f32 q8_0 --batches 1

Each model runs in an engine of its own, in a process of its own, and they take turns; the original runs twice. Its
attention and FFNs are computed by vLLM's own code ("native") or by that of transformers ("transformers"), and so are
those of its exports: a model is compared with the original of the same kind. "f32" and "q8_0" are GGUF files in
llama.cpp, matrices of these types; there prompts of a batch are read one after the other. On a machine with other work,
--busy counts the CPU seconds of one thread instead of the time that passes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fxfuse
from benchmarks.serving.engine import Engine, engine
from fxfuse.bench.timing import Machine, Samples, interleave
from fxfuse.data.loading import Loaded, load, smollm2_path

ORIGINAL, AGAIN = "original", "original again"


def attn(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.self_attn" for layer in layers]


def mlp(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.mlp" for layer in layers]


_DROPPED = (5, 6, 7, 11, 12, 15, 16, 20, 21, 25)
_CHAINS = ((4, 5, 6, 7), (10, 11, 12), (14, 15, 16), (19, 20, 21), (24, 25))
_PAIRS = tuple((layer, layer + 1) for layer in range(4, 26, 2))

PLANS = {
    "fused": fxfuse.Plan(drop=attn(*_DROPPED), parallel=[mlp(*chain) for chain in _CHAINS]),
    "pairs": fxfuse.Plan(parallel=[each(*pair) for pair in _PAIRS for each in (attn, mlp)]),
    "blocks": fxfuse.Plan(parallel=[[[*attn(one), *mlp(one)] for one in pair] for pair in _PAIRS]),
}
"""Ten attentions out and 15 FFNs in five wide ones; 11 layer pairs in parallel; the same as full blocks."""


@dataclass(frozen=True)
class Contestant:
    """A model in the engine: a folder, and what else the engine's worker is told."""

    name: str
    folder: Path
    arguments: tuple[str, ...]


FORMS: Mapping[str, tuple[str, tuple[str, ...], Mapping[str, Any]]] = {
    "native": ("nemotron-nas", ("auto",), {}),
    "transformers": ("transformers", ("transformers",), {}),
    "f32": ("gguf", (), {"type": "f32"}),
    "q8_0": ("gguf", (), {"type": "q8_0"}),
}
"""Of each kind the format, arguments of the engine's worker, and options of the export."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=os.environ.get("SERVING_PYTHON", ""), help="the Python that has vLLM")
    parser.add_argument("--plans", nargs="+", default=["fused"], choices=sorted(PLANS))
    parser.add_argument("--plan", type=Path, help="a plan of your own instead")
    parser.add_argument("--llama-python", default=os.environ.get("LLAMA_PYTHON", ""), help="the one with llama.cpp")
    parser.add_argument("--kinds", nargs="+", default=["native", "transformers"], choices=sorted(FORMS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=256, help="tokens before the first")
    parser.add_argument("--tokens", type=int, default=16, help="tokens after the first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile, too")
    parser.add_argument("--busy", action="store_true", help="count CPU seconds of one thread: the machine is not idle")
    parser.add_argument("--note", default="", help="what else was going on, for the file")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    loaded = load("smollm2")
    plans = {"own": fxfuse.Plan.load(given.plan)} if given.plan else {name: PLANS[name] for name in given.plans}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in given.kinds:
            rows += measured(contestants(loaded, plans, kind, Path(scratch)), kind, given, Path(scratch))
    machine = Machine.here()
    print(f"{machine}; {given.note}\n{table(rows)}")
    if given.json:
        held = {
            "machine": str(machine),
            "note": given.note,
            "compiled": given.compiled,
            "cpu seconds": given.busy,
            "rows": rows,
        }
        given.json.write_text(json.dumps(held, indent=2) + "\n")


def contestants(loaded: Loaded, plans: dict[str, fxfuse.Plan], kind: str, scratch: Path) -> list[Contestant]:
    """The original twice, and its exports, as far as the format of this kind can say the plan."""
    form, arguments, options = FORMS[kind]
    if form == "gguf":
        options = {**options, "vocabulary": smollm2_path()}
        original = fxfuse.export(loaded.model, fxfuse.Plan(), scratch / f"original-{kind}", form, **options)
    elif not (original := scratch / "original").exists():
        loaded.model.save_pretrained(original)  # type: ignore[operator]  # it is a model of Hugging Face
        loaded.tokenizer.save_pretrained(original)  # type: ignore[union-attr]  # SmolLM2 has a tokenizer
    made = [Contestant(ORIGINAL, original, arguments), Contestant(AGAIN, original, arguments)]
    for name, plan in plans.items():
        try:
            folder = fxfuse.export(loaded.model, plan, scratch / f"{name}-{kind}", form, loaded.tokenizer, **options)
        except fxfuse.FxfuseError as error:
            print(f"{name} is not {kind}: {error}")
            continue
        made.append(Contestant(name, folder, arguments))
    return made


def measured(models: list[Contestant], kind: str, given: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Seconds to the first token, and for each after it, of all models in turn."""
    rows = []
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for model in models:
            log = scratch / f"{model.name}-{kind}.log"
            arguments = [str(model.folder), *model.arguments]
            threads = 1 if given.busy else None
            if FORMS[kind][0] == "gguf":
                arguments.append(str(threads or os.cpu_count()))
                started = engine("llama.cpp", given.llama_python, arguments, log, threads)
            else:
                arguments += ["compiled"] * given.compiled
                started = engine("vllm", given.python, arguments, log, threads)
            engines[model.name] = stack.enter_context(started)
        for batch in given.batches:
            prompts = [[(7 * row + 3 * place) % 40_000 + 100 for place in range(given.prompt)] for row in range(batch)]
            counts = 1, given.tokens + 1
            first, whole = (taken(engines, prompts, count, given.rounds, given.busy) for count in counts)
            step = Samples(
                {
                    name: tuple((long - first.median(name)) / given.tokens for long in whole.seconds[name])
                    for name in engines
                }
            )
            for what, samples in (("first token", first), ("next token", step)):
                rows.append(row(kind, batch, what, samples))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def taken(engines: Mapping[str, Engine], prompts: list[list[int]], tokens: int, rounds: int, busy: bool) -> Samples:
    """Seconds until so many tokens are there, of each prompt, by turns; CPU seconds if the machine is ``busy``."""

    def asked(model: Engine) -> Callable[[], object]:
        return lambda: model.generate(prompts, tokens)

    clock = (lambda: sum(model.busy for model in engines.values())) if busy else time.perf_counter
    return interleave({name: asked(model) for name, model in engines.items()}, rounds, 0.0, clock)


def row(kind: str, batch: int, what: str, samples: Samples) -> dict[str, Any]:
    return {
        "kind": kind,
        "batch": batch,
        "what": what,
        "ms": {name: 1e3 * samples.median(name) for name in samples.seconds},
        "to original": {name: samples.ratio(name, ORIGINAL) for name in samples.seconds},
        "void": samples.void(ORIGINAL, AGAIN),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| computed by | batch | | model | ms | of the original | |", "|---|---|---|---|---|---|---|"]
    for each in rows:
        for name, ms in each["ms"].items():
            void = "void" if each["void"] else ""
            where = f"{each['kind']} | {each['batch']} | {each['what']}"
            lines.append(f"| {where} | {name} | {ms:.1f} | {each['to original'][name]:.3f} | {void} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
