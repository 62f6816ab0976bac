"""The central property in one long run: random models, plans and weight updates, and no mismatch among thousands.

    python -m tests.soak.models --models 20000      # on all cores; prints how far it is
    python -m tests.soak.models --models 100 --seed 7

A model is drawn with edits in place, hooks, dialects and shared norms; a plan with drops, groups and private sequences;
options; the road to its graph, ``torch.compile`` for one in four and the much faster ``make_fx`` for the others; and
updates of the weights between calls. Each call is compared with the reference of :mod:`tests.models.reference`, which
shares no code with the library, in float64 to 1e-8. What differs or raises is printed as a spec that can be pasted into
a test. Exits 1 if anything did.
"""

from __future__ import annotations

import argparse
import copy
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen

import fxfuse
from fxfuse.packing.calls import PackedCall
from fxfuse.packing.recipe import extract
from fxfuse.passes import apply_plan
from tests.models import ResidualModel, as_tuple, assert_exact, build, make_input, reference
from tests.models import spec as s
from tests.models.strategies import PlanSpec, fusing_plans, legal_plans, residual_models, swiglu_models
from tests.models.updates import UPDATES, Update, update

BATCH = 50  # models of one seed


@dataclass(frozen=True)
class Case:
    """A model, a plan or none, options of the backend, and what happens to the weights between its calls."""

    spec: s.Model
    plan: PlanSpec | None
    options: dict[str, object]
    compiled: bool
    updates: list[Update]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    if draw(st.integers(0, 3)) == 0:
        spec = draw(swiglu_models())
        plan = draw(st.one_of(fusing_plans(spec), legal_plans(spec)))
    else:
        spec = draw(residual_models(max_layers=3))
        plan = draw(st.one_of(st.none(), legal_plans(spec), legal_plans(spec), legal_plans(spec)))
    weights, kernels = draw(st.sampled_from((("copy", "auto"), ("share", "auto"), ("copy", "fxfuse"))))
    options = {
        "weights": weights,
        "kernels": kernels,
        "merge_gate_up": draw(st.booleans()),
        "strict": plan is not None,
        "inner": "eager",
    }
    compiled = draw(st.integers(0, 7)) in (3, 5)
    return Case(spec, plan, options, compiled, draw(st.lists(st.sampled_from(UPDATES), max_size=2)))


def compile_model(model: ResidualModel, plan: fxfuse.Plan, options: dict[str, object]) -> Callable[[Tensor], object]:
    """By ``torch.compile``."""
    torch._dynamo.reset()
    given_plan = {"plan": plan} if plan else {}
    return torch.compile(model, backend="ffnfuse", options={**options, **given_plan})


def trace_model(
    model: ResidualModel, plan: fxfuse.Plan, options: dict[str, object], x: Tensor
) -> Callable[[Tensor], object]:
    """By ``make_fx``, with the weights as inputs, so that they are packed beside the graph as a backend packs them."""
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]

    def weights() -> list[Tensor]:
        return [*model.parameters(), *model.buffers()]

    def call(weights: list[Tensor], x: Tensor) -> object:
        return functional_call(model, dict(zip(names, weights, strict=True)), (x,))

    gm = make_fx(call)(weights(), x.clone())
    apply_plan(
        gm,
        plan,
        strict=bool(plan),
        root=model,
        inputs=[*weights(), x],
        weights=options["weights"],  # type: ignore[arg-type]  # likewise
        kernels=options["kernels"],  # type: ignore[arg-type]  # drawn from its values
        merge_gate_up=bool(options["merge_gate_up"]),
    )
    recipes = extract(gm)
    if not recipes:
        return lambda x: gm(weights(), x)
    packed = PackedCall(recipes, options["weights"])  # type: ignore[arg-type]  # likewise
    gm.graph.set_codegen(CodeGen())  # its inputs one by one
    gm.recompile()
    packed.compiled = gm
    return lambda x: packed(*weights(), x)


@torch.no_grad()
def check(case: Case) -> None:
    """Raise if a call, before or after an update, is not what the reference says."""
    spec, plan = case.spec, case.plan
    model, x = build(spec), make_input(spec)
    edits = fxfuse.Plan(**plan.as_lists()) if plan is not None else fxfuse.Plan()
    road = compile_model if case.compiled else partial(trace_model, x=x)
    run = road(model, edits, case.options)

    def compare() -> None:
        twin = copy.deepcopy(model)
        if plan is None:
            expected = as_tuple(twin(x.clone()))
        else:
            outputs = reference(twin, x, drop=plan.drop, parallel=plan.parallel, linear=plan.linear, narrow=plan.narrow)
            expected = outputs if spec.taps != "none" else outputs[:1]
        assert_exact(as_tuple(run(x)), expected)

    compare()
    for number, how in enumerate(case.updates):
        update(how, model, spec.seed + number)
        compare()


def batches(first: int, count: int, report: Callable[[str], None]) -> Iterator[int]:
    """Check ``count`` models from seed ``first`` on; yields how many each batch had."""
    for number in range(-(-count // BATCH)):
        done = 0

        @seed(first + number)
        @settings(
            max_examples=BATCH,
            phases=(Phase.generate,),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases())
        def run(case: Case) -> None:
            nonlocal done
            done += 1
            try:
                check(case)
            except Exception as error:
                where = traceback.format_exc().strip().splitlines()
                report(f"{type(error).__name__}: {str(error)[:300]}\n{case}\n" + "\n".join(where[-6:]))

        run()
        yield done


def work(job: tuple[int, int], told: multiprocessing.Queue[tuple[int, str]]) -> None:
    """One process's share."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for done in batches(*job, lambda text: told.put((0, text))):
        told.put((done, ""))
    told.put((-1, ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    share = -(-chosen.models // chosen.jobs)
    context = multiprocessing.get_context("spawn")
    told: multiprocessing.Queue[tuple[int, str]] = context.Queue()
    jobs = [(chosen.seed + 1_000_000 * number, share) for number in range(chosen.jobs)]
    workers = [context.Process(target=work, args=(job, told), daemon=True) for job in jobs]
    for worker in workers:
        worker.start()
    start, done, mismatches, running = time.monotonic(), 0, 0, len(workers)
    while running:
        count, text = told.get()
        if text:
            mismatches += 1
            print(f"MISMATCH {mismatches}\n{text}\n", flush=True)
        elif count < 0:
            running -= 1
        else:
            done += count
            spent = time.monotonic() - start
            left = spent / done * max(0, share * chosen.jobs - done)
            print(f"{done:6} models, {mismatches} mismatches, {spent:.0f} s, {left:.0f} s left", flush=True)
    print(f"{done} models, {mismatches} mismatches")
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
