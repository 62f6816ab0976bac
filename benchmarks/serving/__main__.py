"""Claim: engines serve SmolLM2-135M under a plan faster than as it is: first token, and each token after it.

    python -m benchmarks.serving --python VLLM_PYTHON --json FILE
    python -m benchmarks.serving --llama-python LLAMA_PYTHON --kinds f32 q8_0 --batches 1 --json FILE

The first makes all rows of vLLM: the original, and its exports with ten attentions out ("dropped"), with their FFNs in
groups too ("fused"), with half of all attentions out and their FFNs in groups ("half"), with that half as linear maps
("linear"), with layer pairs ("pairs") and with full blocks ("blocks") in parallel; computed by vLLM's own code
("native") and by that of transformers ("transformers"), as it is ("eager") and compiled ("compiled"); for batches of 1,
8 and 32. Interrupted, the same command goes on after the last batch that is in FILE; --rounds and --stretches may
differ from one batch to another.

Each model runs in an engine of its own, in a process of its own, and they take turns; the original runs twice. A model
is compared with the original of the same kind and mode. "f32" and "q8_0" are GGUF files in llama.cpp, matrices of these
types; there prompts of a batch are read one after the other. On a machine with other work, --busy counts the CPU
seconds of one thread instead of the time that passes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fxfuse
from benchmarks.serving.plans import PLANS
from benchmarks.serving.rows import Rows
from fxfuse.bench.engines.contest import Requests, contest
from fxfuse.bench.engines.process import Engine, Settings, serving
from fxfuse.bench.timing import AGAIN, ORIGINAL, Machine
from fxfuse.data.loading import Loaded, load, smollm2_path

FORMS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "native": ("nemotron-nas", "auto", {}),
    "transformers": ("transformers", "transformers", {}),
    "f32": ("gguf", "auto", {"type": "f32"}),
    "q8_0": ("gguf", "auto", {"type": "q8_0"}),
}
"""Of each kind the format, whose code computes layers in vLLM, and options of the export."""

MODES = ("eager", "compiled")


def main(arguments: Sequence[str] | None = None) -> None:
    given = parsed(arguments)
    plans = {"own": fxfuse.Plan.load(given.plan)} if given.plan else {name: PLANS[name] for name in given.plans}
    rows = Rows(
        given.json,
        {
            "model": given.model,
            "plans": {name: plan.digest for name, plan in plans.items()},
            "prompt": given.prompt,
            "tokens": given.tokens,
            "cpu seconds": given.busy,
        },
    )
    loaded = load(given.model)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in given.kinds:
            modes = MODES[:1] if FORMS[kind][0] == "gguf" else given.modes
            missing = {mode: [batch for batch in given.batches if not rows.has(kind, mode, batch)] for mode in modes}
            if not any(missing.values()):
                continue
            folders = written(loaded, plans, kind, Path(scratch), rows)
            for mode, batches in missing.items():
                if batches:
                    measure(folders, kind, mode, batches, given, rows)
    print(f"{Machine.here()}; {given.note}\n{rows.table()}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=os.environ.get("SERVING_PYTHON", ""), help="the Python that has vLLM")
    parser.add_argument("--llama-python", default=os.environ.get("LLAMA_PYTHON", ""), help="the one with llama.cpp")
    parser.add_argument("--model", default="smollm2", help="a folder of SmolLM2's shape instead")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--plan", type=Path, help="a plan of your own instead")
    parser.add_argument("--kinds", nargs="+", default=["native", "transformers"], choices=sorted(FORMS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512, help="tokens before the first")
    parser.add_argument("--tokens", type=int, default=16, help="tokens after the first, at a stretch")
    parser.add_argument("--stretches", type=int, default=3, help="of so many tokens after each prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", action="store_true", help="count CPU seconds of one thread: the machine is not idle")
    parser.add_argument("--note", default="", help="what else was going on, for the file")
    parser.add_argument("--json", type=Path, help="gets the rows, and is gone on with if it has some")
    return parser.parse_args(arguments)


def written(loaded: Loaded, plans: Mapping[str, fxfuse.Plan], kind: str, scratch: Path, rows: Rows) -> dict[str, Path]:
    """Folders of the original, twice, and of the exports whose plan the format of this kind can say."""
    form, _, options = FORMS[kind]
    if form == "gguf":
        options = {**options, "vocabulary": smollm2_path()}
        original = fxfuse.export(loaded.model, fxfuse.Plan(), scratch / f"original-{kind}", form, **options)
    elif not (original := scratch / "original").exists():
        loaded.model.save_pretrained(original)  # type: ignore[operator]  # it is a model of Hugging Face
    made = {ORIGINAL: original, AGAIN: original}
    for name, plan in plans.items():
        try:
            made[name] = fxfuse.export(loaded.model, plan, scratch / f"{name}-{kind}", form, **options)
        except fxfuse.FxfuseError as error:
            print(f"{name} is not {kind}: {error}", flush=True)
            rows.refuse(kind, name, str(error))
    return made


def measure(
    folders: Mapping[str, Path], kind: str, mode: str, batches: Sequence[int], given: argparse.Namespace, rows: Rows
) -> None:
    """Start an engine for each folder, and add the rows of each batch as soon as they are there."""
    form, implementation, _ = FORMS[kind]
    asked = [Requests(batch, given.prompt, given.tokens, given.stretches) for batch in batches]
    name, python = ("llama.cpp", given.llama_python) if form == "gguf" else ("vllm", given.python)
    settings = Settings(
        implementation=implementation,
        compiled=mode == "compiled",
        dtype="float32",
        room=max(requests.room for requests in asked),
        sequences=max(batches),
        memory=0.9 / len(folders),
        threads=1 if given.busy else None,
    )
    with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for model, folder in folders.items():
            log = Path(logs, model)
            engines[model] = stack.enter_context(serving(name, folder, log, python, settings))
            print(f"{kind}, {mode}: {model}: {engines[model].served.description}", flush=True)
        for requests in asked:
            done = contest(engines, requests, given.rounds, given.busy, progress=True)
            rows.add(kind, mode, done, str(Machine.here()), given.note)
            print(f"{kind}, {mode}, batch {requests.batch}: {'void' if done.void else 'done'}", flush=True)


if __name__ == "__main__":
    main()
