"""Claim: the tasks that ship with fxfuse tell a model from one that a plan damaged, or a healed one from both.

    python benchmarks/tasks.py [--plan FILE] [--healed FOLDER] [--tasks all] [--limit 20] [--json FILE]

Puts tasks to SmolLM2-135M, to the same model under a plan, uncompiled, and to one healed for it, if there is one.
The same documents go to all, so the differences have narrower intervals than the scores.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch

import fxfuse
from fxfuse.bench.timing import Machine
from fxfuse.data.loading import load
from fxfuse.measure.tasks.harness import score
from fxfuse.measure.tasks.scores import TaskScore, table

PLAN = Path(__file__).parent.parent / "examples" / "smollm2-ffn-fusion.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--healed", help="a folder that holds the model healed for the plan")
    parser.add_argument("--tasks", nargs="+", default=["all"])
    parser.add_argument("--limit", type=int, help="documents of each task, at the most")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    plan, loaded = fxfuse.Plan.load(arguments.plan), load("smollm2", dtype=torch.float32)
    models = {"original": loaded.model, "planned": fxfuse.apply(copy.deepcopy(loaded.model), plan, inner="eager")}
    if arguments.healed:
        models["healed"] = fxfuse.apply(load(arguments.healed, dtype=torch.float32).model, plan, inner="eager")
    scores: dict[str, tuple[TaskScore, ...]] = {}
    for name, model in models.items():
        scores[name] = score(model, loaded.tokenizer, arguments.tasks, limit=arguments.limit, progress=True)
        print(f"{name}: {', '.join(f'{each.task} {each.score:.3f}' for each in scores[name])}", flush=True)
    print(table(scores))
    if arguments.json:
        rows = {name: [asdict(each) for each in found] for name, found in scores.items()}
        made = {"machine": str(Machine.here()), "plan": json.loads(plan.to_json()), "scores": rows}
        arguments.json.write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
