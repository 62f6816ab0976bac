"""Question: why is the last FFN of an attention-free run special (arXiv 2503.18908 leaves it out of the fused group)?

    python benchmarks/last_ffn.py --json FILE [--models small smollm2] [--runs 2 3 4 5 6] [--tokens 8192]

From a layer in the middle on, the attentions are dropped, so that 2 to 6 FFNs follow each other. They are then fused
all, all but the last, or all but the first, which tells what is the last one's own from what a smaller group costs
less. KL to the original under each plan, unhealed and after a fit, on topics of Python's documentation that take part
in nothing else; "added" is what fusing costs beyond the same drops unfused. Two models: SmolLM2-135M, and one of 12
layers that the script trains on bytes of the other topics.

FILE is written after each row; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import Plan
from fxfuse._common.files import check_writable, write_atomically
from fxfuse._common.progress import bar
from fxfuse.bench.timing import Machine
from fxfuse.data.loading import load
from fxfuse.data.text import batches_of, python_documentation
from fxfuse.measure.planned import Planned

Batches = Sequence[Mapping[str, object]]

GROUPS = ("none", "all", "last out", "first out")


@dataclass(frozen=True)
class Subject:
    """A model, text to heal it on and to judge it by, and the layer with which the runs begin."""

    model: nn.Module
    heal: Batches
    judge: Batches
    first: int


def smollm2(tokens: int) -> Subject:
    loaded = load("smollm2", torch.float32)

    def batches(text: str, tokens: int) -> Batches:
        return list(batches_of(loaded, text, 256, tokens, batch=2))

    heal = batches(python_documentation("record"), tokens)
    return Subject(loaded.model, heal, batches(python_documentation("hold out"), tokens // 4), 12)


def small(tokens: int, steps: int, path: Path) -> Subject:
    """A Llama of 12 layers and 2.4 million weights, trained on bytes for minutes, once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    text = as_bytes(python_documentation("record"))
    if path.exists():
        model: Any = LlamaForCausalLM.from_pretrained(path)
    else:
        model = LlamaForCausalLM(config)
        train(model, text, steps)
        model.save_pretrained(path)
    judge = batches_from(as_bytes(python_documentation("hold out")), tokens // 2)
    return Subject(model.eval(), batches_from(text, tokens), judge, 4)


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batches_from(ids: Tensor, tokens: int, length: int = 128) -> Batches:
    rows = ids[: min(tokens, len(ids)) // length * length].view(-1, length)
    return [{"input_ids": part, "use_cache": False} for part in torch.split(rows, 8)]


def train(model: Any, ids: Tensor, steps: int, batch: int = 16, length: int = 128) -> None:
    """Adam with a warm-up and a cosine, on sequences drawn from ``ids``."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    with bar("training", "steps", steps, True) as advance:
        for _ in range(steps):
            starts = torch.randint(len(ids) - length, (batch, 1))
            rows = ids[starts + torch.arange(length)]
            model(input_ids=rows, labels=rows).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            advance(1)


def plan_of(first: int, run: int, group: str) -> Plan:
    """The attentions inside a run of FFNs dropped, and those of the run fused that ``group`` says."""
    layers = range(first, first + run)
    drop = [f"model.layers.{layer}.self_attn" for layer in layers[1:]]
    members = {"none": layers[:0], "all": layers, "last out": layers[:-1], "first out": layers[1:]}[group]
    parallel = [[f"model.layers.{layer}.mlp" for layer in members]] if len(members) > 1 else []
    return Plan(drop=drop, parallel=parallel)


def measured(subject: Subject, plan: Plan, fit: bool) -> dict[str, float | None]:
    started = time.monotonic()
    student = copy.deepcopy(subject.model)
    share = fxfuse.heal(student, plan, subject.heal, "fit", progress=True).share if fit else 0.0
    planned = Planned(student)
    planned.plan = plan
    metrics = fxfuse.evaluate(planned, subject.judge, reference=subject.model)
    minutes = (time.monotonic() - started) / 60
    return {"kl": metrics.kl, "perplexity": metrics.perplexity, "share": share, "minutes": minutes}


def wanted(runs: Sequence[int]) -> Iterator[tuple[bool, int, str]]:
    """Fitted or not, the length of the run, the group; a group of one is none."""
    for fit in (False, True):
        for run in runs:
            yield from ((fit, run, group) for group in GROUPS if run > 2 or group in ("none", "all"))


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"| model | run | | {' | '.join(GROUPS)} | added: {' | '.join(GROUPS[1:])} |")
    print("|---" * (2 * len(GROUPS) + 2) + "|")
    for model, fit, run in dict.fromkeys((row["model"], row["fit"], row["run"]) for row in rows):
        own = {row["group"]: row["kl"] for row in rows if (row["model"], row["fit"], row["run"]) == (model, fit, run)}
        kl = [f"{own[group]:.4f}" if group in own else "" for group in GROUPS]
        added = [f"{own[group] - own['none']:.4f}" if group in own else "" for group in GROUPS[1:]]
        print(f"| {model} | {run} | {'fitted' if fit else 'unhealed'} | {' | '.join([*kl, *added])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the rows; those that are there are not made again")
    parser.add_argument("--models", nargs="+", default=["small", "smollm2"], choices=["small", "smollm2"])
    parser.add_argument("--runs", nargs="+", type=int, default=[2, 3, 4, 5, 6])
    parser.add_argument("--tokens", type=int, default=8192, help="to heal on")
    parser.add_argument("--steps", type=int, default=600, help="that the small model is trained")
    parser.add_argument("--unhealed", action="store_true", help="no fits")
    arguments = parser.parse_args()
    check_writable(arguments.json)
    path: Path = arguments.json
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in arguments.models:
        missing = [
            key
            for key in wanted(arguments.runs)
            if not (arguments.unhealed and key[0])
            and (name, *key) not in {(row["model"], row["fit"], row["run"], row["group"]) for row in rows}
        ]
        if not missing:
            continue
        place = path.with_suffix(".small")
        subject = smollm2(arguments.tokens) if name == "smollm2" else small(arguments.tokens, arguments.steps, place)
        for fit, run, group in missing:
            made = measured(subject, plan_of(subject.first, run, group), fit)
            rows.append({"model": name, "fit": fit, "run": run, "group": group, **made})
            whole = {"machine": str(Machine.here()), "tokens": arguments.tokens, "rows": rows}
            write_atomically(path, (json.dumps(whole, indent=2) + "\n").encode())
    show(rows)


if __name__ == "__main__":
    main()
