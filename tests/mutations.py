"""Do the tests notice? Break the library in known ways, one at a time, and see the suite go red.

    python tests/mutations.py            # every mutation; exits 1 if one survives
    python tests/mutations.py scale norm # those whose names contain one of the words

Each mutation is a textual edit of a copy of the package. One whose text is no longer there is an error, so that this
list cannot rot unnoticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """Replace ``old`` by ``new``, once, in ``file``; ``tests`` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FUSE = ("tests/passes/test_fuse_ffn.py",)
RANDOM_MODELS = ("tests/properties/test_plan.py",)

MUTATIONS = (
    Mutation(
        "read past an edit in place",
        "fxfuse/graph/written.py",
        "read = node if alias is overwrites else _reread(graph, alias, node)",
        "read = node if alias is overwrites else alias",
        RANDOM_MODELS,
    ),
    Mutation(
        "see an edit in place by its own name alone",
        "fxfuse/graph/written.py",
        "for region in dict.fromkeys(memory[target] for target in targets):",
        "for region in dict.fromkeys(memory[target] for target in targets if overwrites is not None):",
        RANDOM_MODELS,
    ),
    Mutation(
        "look through a view that cuts rows",
        "fxfuse/graph/peel.py",
        " and last_dim(node) == last_dim(source)",
        "",
        ("tests/graph/test_peel.py",),
    ),
    Mutation(
        "look through a rounded quotient",
        "fxfuse/graph/peel.py",
        ' or "rounding_mode" in call.args',
        "",
        ("tests/graph/test_peel.py", "tests/stream/test_steps.py"),
    ),
    Mutation(
        "erase a write that others read",
        "fxfuse/graph/order.py",
        "or any(user > node for user in alias.users):",
        ":",
        ("tests/graph/test_written.py", "tests/graph/test_order.py"),
    ),
    Mutation(
        "swap two norms",
        "fxfuse/passes/emit/wide.py",
        "pack.weight_of(graph, slot, ffn.normed.factor) for ffn, slot in zip(ffns, column, strict=True)",
        "pack.weight_of(graph, slot, ffn.normed.factor) for ffn, slot in zip(ffns[::-1], column, strict=True)",
        FUSE,
    ),
    Mutation(
        "lose a bias",
        "fxfuse/passes/emit/wide.py",
        "part if part is not None else pack.zeros_for(graph, projection)",
        "pack.zeros_for(graph, projection)",
        FUSE,
    ),
    Mutation(
        "lose the bias of down",
        "fxfuse/passes/emit/wide.py",
        'return pack.total(graph, biases, f"down bias of {names}") if biases else None',
        "return None",
        FUSE,
    ),
    Mutation(
        "read the stream one branch late",
        "fxfuse/passes/parallelize.py",
        "level = self._stream.levels[self._first(group).read]",
        "level = min(self._stream.levels[self._first(group).read] + 1, len(self._stream.sums) - 1)",
        ("tests/passes/test_parallelize.py",),
    ),
    Mutation(
        "read the stream past the norm of a linear attention",
        "fxfuse/stream/ends.py",
        "    held = inputs[0]\n",
        "    held = inputs[0]\n    read = inputs = [next(p for n in body for p in n.all_input_nodes if p in points)]\n",
        ("tests/passes/test_linear.py", "-k", "every_road or output_projections"),
    ),
    Mutation(
        "let what others read of a linear attention move with it",
        "fxfuse/passes/linear.py",
        "    _part(graph.graph, branch, ends, own)\n",
        "",
        ("tests/passes/test_linear.py", "-k", "keys_that_others_read"),
    ),
    Mutation(
        "lose what follows the output projection of a pruned attention",
        "fxfuse/model/learning.py",
        "        path.append(each.path)\n        if each.path == projection:\n            return tuple(reversed(path))",
        "        if each.path == projection:\n            return (each.path,)",
        ("tests/model/test_linear.py", "-k", "modules_after or in_training"),
    ),
    Mutation(
        "forget a scale",
        "fxfuse/passes/emit/wide.py",
        "return scales[0], [1.0] * len(scales)",
        "return Scale(), [1.0] * len(scales)",
        FUSE,
    ),
    Mutation(
        "skip a repack",
        "fxfuse/packing/calls.py",
        "bound is None or bound.stamp != stamp(members) or",
        "bound is None or",
        ("tests/packing/test_calls.py", "-k", "stale"),
    ),
    Mutation(
        "forget the shift of a norm",
        "fxfuse/passes/emit/wide.py",
        "pack.bias_of(graph, slot, ffn.normed.shifts)",
        "pack.bias_of(graph, slot)",
        FUSE,
    ),
    Mutation(
        "forget the eps of a norm that a kernel computes",
        "fxfuse/passes/emit/kernel.py",
        "None, None, eps, kernel.activation.name)",
        "None, None, None if eps is None else 0.0, kernel.activation.name)",
        ("tests/passes/emit/test_kernel.py",),
    ),
    Mutation(
        "pack a weight that the model writes to",
        "fxfuse/graph/constant.py",
        "{node for node in weights if node not in written}",
        "set(weights)",
        ("tests/integration/test_misread.py",),
    ),
    Mutation(
        "take another eps for the same norm",
        "fxfuse/passes/compatible.py",
        ', repr(found.args.get("eps")))',
        ")",
        ("tests/passes/test_fuse_ffn.py",),
    ),
    Mutation(
        "forget what multiplies a norm's shift",
        "fxfuse/ffn/affine.py",
        "(Shift(weight, outer.factor * Factor(number=layer.share)),)",
        "(Shift(weight, Factor(number=layer.share)),)",
        ("tests/ffn/test_affine.py",),
    ),
    Mutation(
        "lose a number on a norm's output",
        "fxfuse/packing/expressions.py",
        "    node = scaled(graph, node, factor.number)\n    wanted",
        "    wanted",
        ("tests/ffn/test_affine.py",),
    ),
    Mutation(
        "forget the factor of a stream",
        "fxfuse/stream/rewrite.py",
        "start = _times(graph, taken, [*each.stream.scale.nodes, *([] if number == 1.0 else [number])])",
        "start = taken",
        ("tests/passes/test_factors.py",),
    ),
    Mutation(
        "take both sides of a factor for one point",
        "fxfuse/stream/finder.py",
        "if not index or link(node) is None:",
        "if not index:",
        ("tests/passes/test_factors.py",),
    ),
    Mutation(
        "measure a group without the factors between",
        "fxfuse/measure/instrument.py",
        "{**self._kept, place.sum.stream.node: made, **passed}",
        "{**self._kept, place.sum.stream.node: made}",
        ("tests/passes/test_factors.py",),
    ),
    Mutation(
        "move what feeds a branch with it",
        "fxfuse/passes/parallelize.py",
        "if branch.crossing:",
        "if False:",
        ("tests/stream/test_feeding.py",),
    ),
    Mutation(
        "watch only the model itself",
        "fxfuse/model/force.py",
        "- {*held, model}:",
        "- {*held, model} - set(model.modules()):",
        ("tests/model/test_force.py", "-k", "method"),
    ),
    Mutation(
        "trust what was traced without a plan",
        "fxfuse/model/force.py",
        "set_parts(holder, _Watched(parts(holder)))",
        "pass",
        ("tests/model/test_force.py", "-k", "before"),
    ),
    Mutation(
        "look at no values",
        "fxfuse/packing/calls.py",
        "            if not watch.same():",
        "            if False:",
        ("tests/packing/test_packs.py", "-k", "noticed"),
    ),
    Mutation(
        "never look at a line",
        "fxfuse/packing/fingerprint.py",
        "for turns in (self._phases, self._turns):",
        "for turns in (self._phases,):",
        ("tests/packing/test_fingerprint.py",),
    ),
    Mutation(
        "verify nothing",
        "fxfuse/passes/base.py",
        "            if control.verifier is not None:",
        "            if False:",
        ("tests/passes/test_verify.py", "tests/passes/test_runner.py"),
    ),
    Mutation(
        "make rewrites without fuel",
        "fxfuse/passes/base.py",
        "        taken = min(wanted, self.fuel)",
        "        taken = wanted",
        ("tests/passes/test_runner.py",),
    ),
    Mutation(
        "go on with the streams from before a pass",
        "fxfuse/passes/runner.py",
        "            self._graph.forget()",
        "            pass",
        ("tests/passes/test_runner.py", "tests/passes/test_pipeline.py"),
    ),
    Mutation(
        "take what a call saw for what was packed",
        "fxfuse/packing/packs.py",
        "        self.expire()\n        self._stamped = stamp(members)",
        "        self._stamped = stamp(members)",
        ("tests/packing/test_packs.py", "-k", "average"),
    ),
    Mutation(
        "find every part right",
        "fxfuse/packing/strategy.py",
        "return torch.equal(bits(made), bits(region))",
        "return True",
        ("tests/packing/test_packs.py", "-k", "one_number"),
    ),
    Mutation(
        "overwrite memory that a shared weight has left",
        "fxfuse/packing/packs.py",
        "if self._strategy.moves and any(part.member is not None for part, _ in stale):",
        "if False:",
        ("tests/packing/test_packs.py", "-k", "average"),
    ),
    Mutation(
        "heal towards what the plan adds only later",
        "fxfuse/healing/targets.py",
        "if branch.name not in inside and branch.name not in plan.drop]",
        "if False]",
        ("tests/healing/test_fit.py", "-k", "later"),
    ),
    Mutation(
        "fit to tokens that are held out",
        "fxfuse/healing/fit.py",
        "key = sample.domain if sample.held else None",
        "key = sample.domain if sample.held and not sample.pair.step.maps else None",
        ("tests/healing/test_fit.py",),
    ),
    Mutation(
        "fit the map of the bias to the weight's",
        "fxfuse/healing/maps.py",
        "inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1)",
        "inputs = torch.cat([inputs.new_ones(*inputs.shape[:-1], 1), inputs], -1)",
        ("tests/healing/test_fit.py", "-k", "planted"),
    ),
    Mutation(
        "keep what heals one text and hurts another",
        "fxfuse/healing/heal.py",
        "if left < least and all(now[name] < unhealed[name] for name in now):",
        "if left < least:",
        ("tests/healing/test_heal.py", "-k", "one_kind"),
    ),
    Mutation(
        "take two candidates that name one branch",
        "fxfuse/planning/solvers/problem.py",
        "if len(numbers) > 1))",
        "if len(numbers) > 2))",
        ("tests/planning/solvers/test_mip.py",),
    ),
    Mutation(
        "let the product of two candidates be less than it is",
        "fxfuse/planning/solvers/mip.py",
        "if term > 0:  # minimised",
        "if term < 0:  # minimised",
        ("tests/planning/solvers/test_mip.py",),
    ),
    Mutation(
        "give one solution of a pool again",
        "fxfuse/planning/solvers/mip.py",
        "return LinearConstraint(row, distance - len(chosen), np.inf)",
        "return LinearConstraint(row, -len(chosen), np.inf)",
        ("tests/planning/solvers/test_mip.py",),
    ),
    Mutation(
        "measure one edit for all",
        "fxfuse/planning/find.py",
        "return self._under(together(self._recording, [edit]))",
        "return self._planned if self._planned.plan else self._under(edit)",
        ("tests/planning/test_find.py",),
    ),
)


def survives(mutation: Mutation) -> bool:
    """Whether the tests stay green with the mutation in place."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("fxfuse", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        file = copy / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            raise SystemExit(
                f"{mutation.name}: {mutation.file} no longer has its text once; bring tests/mutations.py up to date"
            )
        file.write_text(text.replace(mutation.old, mutation.new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
            *mutation.tests,
        ]
        environment = {**os.environ, "PYTHONPATH": str(copy), "CI": "1", "HYPOTHESIS_PROFILE": "mutants"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{mutation.name}: the tests could not run\n{done.stdout}\n{done.stderr}")
        where = next((line for line in done.stdout.splitlines() if line.startswith("FAILED")), "").split(" - ")[0]
        print(f"{'SURVIVES' if done.returncode == 0 else 'caught  '}  {mutation.name}  {where}", flush=True)
        return done.returncode == 0


def main(words: list[str]) -> int:
    chosen = [each for each in MUTATIONS if not words or any(word in each.name for word in words)]
    survivors = [each for each in chosen if survives(each)]
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
