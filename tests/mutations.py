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
        "move a gain past an all-reduce",
        "fxfuse/ffn/anatomy.py",
        "if gains or how is not None or found is None:",
        "if how is not None or found is None:",
        ("tests/passes/test_join_reductions.py",),
    ),
    Mutation(
        "join all-reduces of different kinds",
        "fxfuse/passes/join_reductions.py",
        "key = (part.how, shape(",
        "key = (shape(",
        ("tests/passes/test_join_reductions.py",),
    ),
    Mutation(
        "forget by how much a term of one all-reduce is scaled",
        "fxfuse/passes/join_reductions.py",
        "own = [ONE if part.scale == outer else replace(part.scale, nodes=()) for part in joined.parts]",
        "own = [ONE for part in joined.parts]",
        ("tests/passes/test_join_reductions.py",),
    ),
    Mutation(
        "join an all-reduce that others read",
        "fxfuse/passes/join_reductions.py",
        "within=lambda inner: len(inner.users) == 1",
        "within=lambda inner: True",
        ("tests/passes/test_join_reductions.py",),
    ),
    Mutation(
        "all-reduce what is scattered",
        "fxfuse/passes/normalise/shards.py",
        "if mesh is None or type(before) is not Partial or after != _REPLICATED:",
        "if mesh is None or type(before) is not Partial:",
        ("tests/passes/normalise/test_shards.py",),
    ),
    Mutation(
        "add a bias in every process of an all-reduce",
        "fxfuse/passes/normalise/shards.py",
        "added = self._share(node, bias, parts[2])",
        "added = parts[2]",
        ("tests/passes/normalise/test_shards.py",),
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
        "pack.weight_of(graph, slot, _factor(ffn)) for ffn, slot in zip(ffns, column, strict=True)",
        "pack.weight_of(graph, slot, _factor(ffn)) for ffn, slot in zip(ffns[::-1], column, strict=True)",
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
        "let a narrowed FFN's down projection read other columns",
        "fxfuse/passes/narrow.py",
        "weight = pack.kept(graph, weight, 1, self._units, projection.weight, *sizes)",
        "weight = pack.kept(graph, weight, 1, tuple(range(len(self._units))), projection.weight, *sizes)",
        ("tests/passes/test_narrow.py", "-k", "reads_zeros or spelling"),
    ),
    Mutation(
        "forget the units of a bias",
        "fxfuse/passes/narrow.py",
        "bias = pack.kept(graph, bias, 0, self._units, projection.bias, count)",
        "bias = pack.kept(graph, bias, 0, tuple(range(count)), projection.bias, count)",
        ("tests/passes/test_narrow.py", "-k", "spelling"),
    ),
    Mutation(
        "take the units of a packed weight apart from it",
        "fxfuse/packing/recipe.py",
        "        if root.users and root.users.keys() <= outer:\n            continue",
        "        if False:\n            continue",
        ("tests/passes/test_narrow.py", "-k", "taken_once"),
    ),
    Mutation(
        "fit columns that a narrowed FFN has not",
        "fxfuse/healing/maps.py",
        "whole.index_copy(int(not self.transposed), places, made[self.weight])",
        "whole.index_copy(int(not self.transposed), places.sort(descending=True).values, made[self.weight])",
        ("tests/healing/test_narrow.py", "-k", "ridge"),
    ),
    Mutation(
        "rank hidden units by their activations alone",
        "fxfuse/measure/measurements.py",
        "self.units[name] = activations * columns",
        "self.units[name] = activations",
        ("tests/measure/test_units.py", "-k", "length_of_the_column"),
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
        "            or bound.stamp != self._now(members)\n",
        "",
        ("tests/packing/test_calls.py", "-k", "stale"),
    ),
    Mutation(
        "forget what quantized weights are made of",
        "fxfuse/packing/packs.py",
        "return [held for member in members for held in inner(member)]",
        "return list(members)",
        ("tests/integration/test_quantized.py", "-k", "missed"),
    ),
    Mutation(
        "fold a gain into quantized weights",
        "fxfuse/passes/compatible.py",
        "reads=numbering[projections[0].input] if ffn.quantized else bare_key(ffn.normed, numbering),",
        "reads=bare_key(ffn.normed, numbering),",
        ("tests/integration/test_quantized.py", "-k", "exact_on_quantized_weights and groups"),
    ),
    Mutation(
        "join columns whose inputs are quantized together",
        "fxfuse/ffn/quantized.py",
        "    if columns.dynamic:",
        "    if False:",
        ("tests/integration/test_quantized.py", "-k", "no_more"),
    ),
    Mutation(
        "join columns that have one scale for a whole row",
        "fxfuse/ffn/quantized.py",
        "    if columns.columns >= down.fan_in:",
        "    if False:",
        ("tests/integration/test_quantized.py", "-k", "no_more"),
    ),
    Mutation(
        "read a file of tensors that is not what was written",
        "fxfuse/_common/sealed.py",
        "if digest is not None and digest != _digest(header, tensors):",
        "if False:",
        ("tests/_common/test_sealed.py", "tests/properties/test_files.py", "-k", "flipped or not_written"),
    ),
    Mutation(
        "read costs of other types",
        "fxfuse/planning/costs.py",
        "return typed(cls, json.loads(Path(path).read_text()))",
        "return cls(**json.loads(Path(path).read_text()))",
        ("tests/properties/test_files.py", "-k", "type and costs"),
    ),
    Mutation(
        "forget the shift of a norm",
        "fxfuse/passes/emit/wide.py",
        "pack.bias_of(graph, slot, () if ffn.quantized else ffn.normed.shifts)",
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
        ', repr(call.args.get("eps")))',
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
        "start = _times(graph, taken, [*residual.stream.scale.nodes, *([] if number == 1.0 else [number])])",
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
        "carry an FFN over a drop with the point that it read before",
        "fxfuse/stream/carry.py",
        "ffn=_now(branch.ffn, replaced),",
        "ffn=branch.ffn,",
        ("tests/properties/test_carry.py",),
    ),
    Mutation(
        "take what a call saw for what was packed",
        "fxfuse/packing/packs.py",
        "        self.expire()\n        self._stamped = stamp(plain(members))",
        "        self._stamped = stamp(plain(members))",
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
        "seek the ridge's strength among smaller ones alone",
        "fxfuse/healing/ridge.py",
        "min((index, index - 1, index + 1), key=at)",
        "min((index, index - 1), key=at)",
        ("tests/healing/test_ridge.py", "-k", "best_of_all"),
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
        "fxfuse/healing/judge.py",
        "if left < least and all(now[name] < before[name] for name in now):",
        "if left < least:",
        ("tests/healing/test_heal.py", "-k", "one_kind"),
    ),
    Mutation(
        "let a name end the page's data",
        "fxfuse/report/page/page.py",
        r'.replace("<", "\\u003c")',
        "",
        ("tests/report/page/test_page.py", "-k", "names_stay_text"),
    ),
    Mutation(
        "paint the distances of the column before",
        "fxfuse/report/page/matrix.py",
        "        column = i + 1\n",
        "        column = i\n",
        ("tests/report/page/test_matrix.py",),
    ),
    Mutation(
        "draw a private sequence as members side by side",
        "fxfuse/report/page/stream.py",
        "members += drawn if isinstance(member, str) else",
        "members += drawn if drawn else",
        ("tests/report/page/test_stream.py",),
    ),
    Mutation(
        "leave a hook of ours where it was inserted",
        "fxfuse/_torch/modules.py",
        "    hooks.clear()\n    hooks.update(in_order)\n",
        "    hooks.update(in_order)\n",
        ("tests/_torch/test_modules.py",),
    ),
    Mutation(
        "divide a cache among more GPUs than it has heads",
        "fxfuse/hardware/decode.py",
        "min(setting.tensor_parallel, shape.heads)",
        "setting.tensor_parallel",
        ("tests/hardware/test_decode.py",),
    ),
    Mutation(
        "keep what one method of several made worse",
        "fxfuse/healing/judge.py",
        "bool(change.after)), change.share(best)",
        "bool(change.after)), change.share(1.0)",
        ("tests/healing/test_methods.py", "-k", "worse"),
    ),
    Mutation(
        "distill from the planned model",
        "fxfuse/healing/trainer.py",
        "logits_now(self._teacher, 0, inputs)",
        "checked(model(**arguments(bare(self.model), inputs)), inputs).detach()",
        ("tests/healing/test_distill.py", "-k", "whole_vocabulary"),
    ),
    Mutation(
        "distill on tokens that the mask hides",
        "fxfuse/healing/loss.py",
        "~(seen[:, 1:] & seen[:, :-1])",
        "torch.zeros_like(seen[:, 1:])",
        ("tests/healing/test_distill.py", "-k", "TestLoss"),
    ),
    Mutation(
        "train what the plan drops",
        "fxfuse/healing/choice.py",
        "_used(captured.copy(), plan, model,",
        "_used(captured.copy(), Plan(), model,",
        ("tests/healing/test_distill.py", "-k", "TestChoice"),
    ),
    Mutation(
        "begin a distillation from the original's weights",
        "fxfuse/healing/student.py",
        "parameter.data.copy_(start[name])",
        "parameter.data.copy_(parameter)",
        ("tests/healing/test_methods.py", "-k", "begins"),
    ),
    Mutation(
        "let all kinds of text count alike in a distillation",
        "fxfuse/healing/trainer.py",
        "weight = weight_of(inputs)",
        "weight = 1.0",
        ("tests/healing/test_weights.py", "-k", "distillation"),
    ),
    Mutation(
        "export attentions under the numbers that they had",
        "fxfuse/exporting/copied/planned_edit.py",
        'setattr(part, "layer_idx", number)',
        'setattr(part, "layer_idx", part.layer_idx)',
        ("tests/exporting/test_transformers.py::test_there_is_a_layer_for_each_attention_and_caches_have_no_gaps",),
    ),
    Mutation(
        "export a private sequence that reads the stream as it was",
        "fxfuse/exporting/copied/planned_edit.py",
        "tree(stream + grown, args, kwargs)",
        "tree(stream, args, kwargs)",
        ("tests/exporting/test_transformers.py::test_a_folder_computes_what_the_planned_model_does[llama-blocks]",),
    ),
    Mutation(
        "export a sequence without what its layer multiplies with",
        "fxfuse/exporting/trees.py",
        'return made[0] if len(made) == 1 else {"chain": made, "scale": over}',
        'return made[0] if len(made) == 1 else {"chain": made, "scale": 1.0}',
        ("tests/exporting/test_transformers.py::test_a_folder_computes_what_the_planned_model_does[granite-ends]",),
    ),
    Mutation(
        "export a wide FFN without the gains of its norms",
        "fxfuse/exporting/wide.py",
        "part.ffn.normed.factor if fold else ONE",
        "ONE",
        ("tests/exporting/test_nemotron_nas.py::test_a_folder_computes_what_the_planned_model_does[llama]",),
    ),
    Mutation(
        "export scores of another scale than the model's",
        "fxfuse/exporting/attention.py",
        "write.rows(q.projection).times(turn),",
        "write.rows(q.projection),",
        ("tests/exporting/test_nemotron_nas.py::test_a_folder_computes_what_the_planned_model_does[granite]",),
    ),
    Mutation(
        "write queries and keys of a GGUF file in transformers' order",
        "fxfuse/exporting/gguf.py",
        ".reshape(heads, 2, -1, *made.shape[1:]).transpose(1, 2)",
        ".reshape(heads, 2, -1, *made.shape[1:])",
        ("tests/exporting/test_gguf.py::test_features_that_are_turned_together_lie_side_by_side",),
    ),
    Mutation(
        "fill a layer of a GGUF file up with what contributes",
        "fxfuse/exporting/gguf.py",
        "columns = filled(0.0, (width, BLOCK), dtype)",
        "columns = filled(1.0, (width, BLOCK), dtype)",
        ("tests/exporting/test_gguf.py::test_an_attention_without_an_ffn_gets_one_of_zeros",),
    ),
    Mutation(
        "let exported graphs attend to padding",
        "fxfuse/exporting/cached.py",
        "attention_mask=mask,",
        "attention_mask=torch.ones_like(mask),",
        ("tests/exporting/test_pt2.py::test_a_prompt_in_pieces_gives_the_planned_models_logits",),
    ),
    Mutation(
        "let an export that failed stay",
        "fxfuse/exporting/folder.py",
        "    finally:\n        shutil.rmtree(partial, ignore_errors=True)\n",
        "    finally:\n",
        ("tests/exporting/test_folder.py",),
    ),
    Mutation(
        "throw away the old folder of an export that was killed",
        "fxfuse/exporting/folder.py",
        "if old.is_dir() and not target.exists():",
        "if False:",
        ("tests/exporting/test_folder.py::test_what_was_killed_between_two_names_is_put_back",),
    ),
    Mutation(
        "let vLLM serve a planned model that lacks weights",
        "fxfuse/exporting/vllm_plugin.py",
        "if missing:",
        "if False:",
        ("tests/exporting/test_vllm_plugin.py::test_a_weight_that_is_given_by_nobody_is_an_error",),
    ),
    Mutation(
        "let the original always answer first",
        "fxfuse/bench/engines/contest.py",
        "orders = list(engines), list(engines)[::-1]",
        "orders = list(engines), list(engines)",
        ("tests/bench/engines/test_contest.py",),
    ),
    Mutation(
        "count tokens from the sequence that was read first",
        "fxfuse/bench/engines/vllm_worker.py",
        "self._until(min(map(len, self._made.values())) + count)",
        "self._until(max(map(len, self._made.values())) + count)",
        ("tests/bench/engines/test_process.py",),
    ),
    Mutation(
        "time an engine that has to preempt sequences",
        "fxfuse/bench/engines/contest.py",
        "if engine.served.holds < requests.batch * requests.room:",
        "if engine.served.holds < requests.room:",
        ("tests/bench/engines/test_contest.py",),
    ),
    Mutation(
        "compute the original natively and its export by transformers",
        "fxfuse/cli/serving.py",
        'if chosen == "auto" and format_of(export) == "transformers":',
        "if False:",
        ("tests/cli/test_serving.py",),
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
    Mutation(
        "score linear maps by what the output projection holds",
        "fxfuse/planning/find.py",
        "for name in plan.linear for k, value in self._maps.get(name, {}).items()",
        "for name in () for k, value in self._maps.get(name, {}).items()",
        ("tests/planning/test_find.py", "-k", "fitted_before"),
    ),
    Mutation(
        "fit a map behind others that were changed",
        "fxfuse/healing/pair.py",
        "self._leave({}, {self.step.out: self._whole_goal()})",
        "self._leave({}, {})",
        ("tests/healing/test_alone.py",),
    ),
    Mutation(
        "keep what was measured with other maps",
        "fxfuse/planning/state.py",
        'if not edit.linear or header["text"] == self._text',
        "",
        ("tests/planning/test_find.py", "-k", "other_text"),
    ),
    Mutation(
        "take what a branch takes by itself for what it takes in the model",
        "fxfuse/bench/branches.py",
        "if kind not in fewer:",
        "if True:",
        ("tests/planning/test_costs.py", "-k", "less_without"),
    ),
    Mutation(
        "fit a map behind a norm as if no norm followed",
        "fxfuse/healing/maps.py",
        "return inputs if self.norm is None else inputs / self.norm.lengths(self._output(values))",
        "return inputs",
        ("tests/healing/test_output_norm.py", "-k", "planted or nearer"),
    ),
    Mutation(
        "fit a map behind a norm once",
        "fxfuse/healing/fit.py",
        "* (ROUNDS if bent else 1)",
        "* 1",
        ("tests/healing/test_output_norm.py", "-k", "planted"),
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
