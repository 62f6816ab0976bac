from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import Plan, PlanError
from fxfuse.errors import CaptureError, OptionError
from fxfuse.plan import Decision
from tests.models.checks import assert_exact
from tests.models.tiny import Counter, Tower, llama, tokens, vectors


@pytest.fixture(scope="module")
def table() -> fxfuse.Explanation:
    return fxfuse.explain(llama(3), tokens(), use_cache=False)


class TestTheTable:
    def test_a_llama_has_two_branches_a_layer_in_stream_order(self, table: fxfuse.Explanation) -> None:
        assert [(branch.name, branch.kind) for branch in table.branches] == [
            pair
            for layer in range(3)
            for pair in (
                (f"model.layers.{layer}.self_attn", "attention"),
                (f"model.layers.{layer}.mlp", "gated_ffn"),
            )
        ]

    def test_each_reads_the_sum_before_it_and_none_is_edited(self, table: fxfuse.Explanation) -> None:
        assert [(branch.reads, branch.adds) for branch in table.branches] == [(k, k) for k in range(6)]
        assert {(branch.graph, branch.stream, branch.scale) for branch in table.branches} == {(0, 0, 1.0)}
        assert {(branch.edit, branch.fused) for branch in table.branches} == {("", "")}

    def test_parameters_are_counted_with_the_norms(self, table: fxfuse.Explanation) -> None:
        attention = 32 * 32 * 2 + 32 * 16 * 2 + 32
        ffn = 3 * 32 * 40 + 32
        assert [branch.parameters for branch in table.branches] == [attention, ffn] * 3

    def test_what_is_not_fused_has_a_reason(self, table: fxfuse.Explanation) -> None:
        assert {branch.reason for branch in table.branches if branch.kind == "attention"} == {"attention"}
        assert all(branch.reason for branch in table.branches)

    def test_as_text_it_has_a_row_for_each_branch(self, table: fxfuse.Explanation) -> None:
        lines = str(table).splitlines()
        assert lines[0] == "names begin with model.layers."
        assert lines[1].split() == ["branch", "kind", "reads", "weights", "note"]
        assert len(lines) == 3 + 6 + 2
        for branch, line in zip(table.branches, lines[3:], strict=False):
            assert line.split()[:3] == [branch.name.removeprefix("model.layers."), branch.kind, str(branch.reads)]
        assert lines[4].split() == "0.mlp gated_ffn 1 3.87K could join 1.mlp*".split()
        assert lines[-1].startswith("3 attention, 3 gated_ffn in 1 graph(s), ")

    @pytest.mark.parametrize("planned", [False, True])
    def test_no_line_is_longer_than_80_columns_however_long_names_and_reasons(self, planned: bool) -> None:
        class Deep(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a_tower_of_layers_with_a_name_that_never_ends = Apart()
                self.head = Tower(1)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.a_tower_of_layers_with_a_name_that_never_ends(x))  # type: ignore[no-any-return]

        mlps = [f"a_tower_of_layers_with_a_name_that_never_ends.second.layers.{k}.mlp" for k in (0, 2)]
        plan = Plan(parallel=[mlps], why=[Decision("parallel", tuple(mlps), "kept", "very good " * 20, 0.1)])
        found = fxfuse.explain(Deep(), vectors(), plan=plan if planned else None)

        assert max(map(len, str(found).splitlines())) <= 80
        assert sum("ffn" in line for line in str(found).splitlines()[:-1]) == len(found.branches) == 6

    def test_as_json_it_says_the_same(self, table: fxfuse.Explanation) -> None:
        data = json.loads(table.to_json())
        assert (data["graphs"], data["nodes"]) == (table.graphs, table.nodes)
        for row, branch in zip(data["branches"], table.branches, strict=True):
            assert row == json.loads(json.dumps(asdict(branch)))

    def test_a_model_without_a_stream_says_so(self) -> None:
        found = fxfuse.explain(nn.Linear(4, 4), torch.ones(2, 4))
        assert found.branches == ()
        first, second, last = str(found).splitlines()
        assert first == "no residual stream in 1 graph(s)"
        assert second.startswith(f"graph 0: {found.nodes} nodes: 1 linear; 0 adds")
        assert "--trace" in last


class TestWithAPlan:
    def test_it_says_what_is_dropped_and_what_becomes_wide(self) -> None:
        plan = Plan(
            drop=["model.layers.1.self_attn"],
            parallel=[["model.layers.0.mlp", "model.layers.1.mlp"], ["model.layers.2.self_attn", "model.layers.2.mlp"]],
        )
        found = {b.name: b for b in fxfuse.explain(llama(3), tokens(), use_cache=False, plan=plan).branches}

        rows = [found[f"model.layers.{k}.{part}"] for k in range(3) for part in ("self_attn", "mlp")]
        assert [row.edit for row in rows] == ["", "parallel 0", "drop", "parallel 0", "parallel 1", "parallel 1"]
        assert [row.fused for row in rows] == ["", "wide", "", "wide", "", ""]
        assert [bool(row.reason) for row in rows] == [True, False, True, False, True, True]

    def test_the_plans_decisions_are_shown(self) -> None:
        model = Tower(2)
        made = Decision("parallel", tuple(model.mlps), "kept", "adds 0.01; it may add 0.02", 0.25, kl=0.01, added=0.01)
        found = fxfuse.explain(model, vectors(), plan=Plan(parallel=[model.mlps], why=[made]))

        shown = " ".join(str(found).split())
        assert "kept parallel 0.mlp + 1.mlp (score 0.25, KL 0.01): adds 0.01; it may add 0.02" in shown
        assert json.loads(found.to_json())["plan"]["why"][0]["added"] == 0.01

    def test_reads_are_those_of_the_model_itself(self) -> None:
        model = Tower(3)
        found = fxfuse.explain(model, vectors(), plan=Plan(parallel=[model.mlps]))
        assert [(branch.reads, branch.adds) for branch in found.branches] == [(0, 0), (1, 1), (2, 2)]

    @pytest.mark.parametrize(
        ("group", "words"),
        [
            (["layers.1.mlp", "layers.2.mpl"], r"parallel\[0\]: 'layers.2.mpl'.*nearest: layers.2.mlp"),
            (["layers.7.mlp", "layers.8.mlp"], r"parallel\[0\]: the model has none of 'layers.7.mlp'"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:fxfuse")
    def test_a_group_that_does_not_fit_is_an_error_that_names_it(self, group: list[str], words: str) -> None:
        with pytest.raises(PlanError, match=words):
            fxfuse.explain(Tower(3), vectors(), plan=Plan(parallel=[group]))

    def test_a_dropped_name_that_is_not_there_warns_with_the_nearest(self) -> None:
        with pytest.warns(UserWarning, match=r"'layers.1.mpl' is no branch .*nearest: layers.1.mlp"):
            fxfuse.explain(Tower(3), vectors(), plan=Plan(drop=["layers.1.mpl"]))

    @pytest.mark.parametrize(
        ("model", "name", "words"),
        [
            (Tower(3).layers[1], "layers.1.mlp", "'layers.1.mlp' is no branch of this graph; nearest: mlp$"),
            (Tower(3), "mlp", "'mlp' is no branch .*; nearest: layers.0.mlp, layers.1.mlp, layers.2.mlp$"),
            (Tower(4), "attn", "'attn' .*; there are: layers.0.mlp, layers.1.mlp, layers.2.mlp, ...$"),
            (Tower(2), "attn", "'attn' .*; there are: layers.0.mlp, layers.1.mlp$"),
        ],
        ids=["a layer by itself", "a part of a name", "nothing alike", "nothing alike, and few"],
    )
    def test_a_name_from_elsewhere_warns_with_what_it_is_here(self, model: nn.Module, name: str, words: str) -> None:
        with pytest.warns(UserWarning, match=words):
            fxfuse.explain(model, vectors(), plan=Plan(drop=[name]))

    def test_it_takes_the_path_of_a_plan(self, tmp_path: Path) -> None:
        model, x = Tower(3), vectors()
        plan = Plan(parallel=[model.mlps])
        plan.save(tmp_path / "plan.json")

        expected = fxfuse.explain(model, x, plan=plan).branches
        assert fxfuse.explain(model, x, plan=tmp_path / "plan.json").branches == expected
        assert fxfuse.explain(model, x, plan=str(tmp_path / "plan.json")).branches == expected

    def test_what_is_no_plan_is_an_error(self) -> None:
        with pytest.raises(OptionError, match="'plan' is a fxfuse.Plan or the path of one, not dict"):
            fxfuse.explain(Tower(2), vectors(), plan={"drop": ["layers.1.mlp"]})  # type: ignore[arg-type]  # on purpose

    def test_a_pruned_model_is_explained_under_its_plan(self) -> None:
        model, x = Tower(3), vectors()
        plan = Plan(drop=["layers.1.mlp"])
        fxfuse.prune(model, plan, x)
        found = fxfuse.explain(model, x, plan=plan)
        assert [branch.name for branch in found.branches] == ["layers.0.mlp", "layers.2.mlp"]

    def test_a_linear_attention_is_told_by_its_edits_and_after_pruning_too(self) -> None:
        model, ids = llama(2), tokens()
        (first, second), ffn = (f"model.layers.{layer}.self_attn" for layer in range(2)), "model.layers.0.mlp"
        plan = Plan(linear=[first, second], parallel=[[ffn, second]])
        found = fxfuse.explain(model, ids, use_cache=False, plan=plan)
        edits = [(branch.name, branch.kind, branch.edit) for branch in found.branches[:3]]
        assert edits == [
            (first, "attention", "linear"),
            (ffn, "gated_ffn", "parallel 0"),
            (second, "attention", "linear, parallel 0"),
        ]
        assert found.branches[0].reason == "one linear map of its norm: no scores, no cache"

        fxfuse.prune(model, plan)
        found = fxfuse.explain(model, ids, use_cache=False, plan=plan)
        assert [(branch.name, branch.edit) for branch in found.branches[:3]] == [
            (name, edit) for name, _, edit in edits
        ]
        assert [branch.kind for branch in found.branches] == ["linear", "gated_ffn"] * 2


class TestTheModelStaysAsItIs:
    def test_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            model = llama(2, dtype=torch.bfloat16)
            found = fxfuse.explain(model, torch.zeros(1, 5, dtype=torch.long), use_cache=False)

        assert [branch.kind for branch in found.branches] == ["attention", "gated_ffn"] * 2
        assert {each.device.type for each in model.parameters()} == {"meta"}

    def test_in_training_with_gradients_it_leaves_no_trace(self) -> None:
        model, x = Tower(2).train(), vectors().requires_grad_()
        before = {name: each.clone() for name, each in model.state_dict().items()}
        modules = dict(model.named_modules())
        fxfuse.explain(model, x, plan=Plan(parallel=[model.mlps]))

        assert model.training
        assert torch.is_grad_enabled()
        assert all(each.grad is None for each in model.parameters())
        assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
        assert dict(model.named_modules()) == modules
        assert model._compiled_call_impl is None

    @pytest.mark.parametrize("in_place", [True, False], ids=["model.compile", "torch.compile"])
    def test_a_compiled_one_is_not_compiled_anew(self, in_place: bool) -> None:
        model, x, counter = Tower(3), vectors(), Counter()
        options = {"plan": Plan(parallel=[model.mlps]), "inner": counter}
        made: Any = model
        if in_place:
            model.compile(backend="ffnfuse", options=options)
        else:
            made = torch.compile(model, backend="ffnfuse", options=options)
        expected = model.parallel(x)
        made(x)
        for _ in range(3):
            assert len(fxfuse.explain(model, x).branches) == 3
        assert_exact([made(x)], [expected])

        assert len(counter) == 1


class Broken(Tower):
    """A graph break in the loop: Dynamo compiles the layers' own frames, whose code the compiled model has too."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


def test_a_model_in_several_graphs_says_how_to_find_what_cuts_it() -> None:
    assert "graph_breaks" not in str(fxfuse.explain(Tower(3), vectors()))
    assert "3 gated_ffn in 3 graph(s)" in str(broken := fxfuse.explain(Broken(3), vectors()))
    assert "TORCH_LOGS=graph_breaks" in str(broken)


class Apart(nn.Module):
    """A short stream, whose one layer runs twice, and a longer one that begins with what the first has become."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.second = Tower(1), nn.Linear(8, 8).double(), Tower(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.between(self.first(self.first(x)))))


def test_a_recording_numbers_streams_and_branches_alike() -> None:
    model, x = Apart(), vectors()

    rows = fxfuse.explain(model, x).branches
    recorded = fxfuse.record(model, [{"x": x}]).branches

    facts = [(row.name, row.kind, row.stream, row.reads, row.adds) for row in rows]
    assert [(row.name, row.kind, row.stream, row.reads, row.adds) for row in recorded] == facts
    names = ["@0", "@1", *(f"second.layers.{index}.mlp" for index in range(3))]
    assert [(name, stream) for name, _, stream, *_ in facts] == list(zip(names, [0, 0, 1, 1, 1], strict=True))


class TestManyTimes:
    @pytest.mark.parametrize("kind", [Tower, Broken])
    def test_every_one_finds_the_same(self, kind: type[Tower]) -> None:
        model, x = kind(3), vectors()
        with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=False):
            found = [fxfuse.explain(model, x) for _ in range(6)]

        assert [branch.name for branch in found[0].branches] == model.mlps
        assert [each.branches for each in found] == [found[0].branches] * 6

    @pytest.mark.parametrize("kind", [Tower, Broken])
    def test_a_model_that_is_compiled_afterwards_has_its_whole_recompile_limit(self, kind: type[Tower]) -> None:
        model, counter = kind(2), Counter()
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
            for _ in range(4):
                fxfuse.explain(model, vectors())
            made = torch.compile(model, backend=counter, dynamic=False)
            for length in (2, 3, 4):
                made(vectors(1, length, 8))

        assert len(counter) >= 3

    @pytest.mark.parametrize("kind", [Tower, Broken])
    def test_a_compiled_model_keeps_its_graphs(self, kind: type[Tower]) -> None:
        model, x, counter = kind(3), vectors(), Counter()
        made = torch.compile(model, backend="ffnfuse", options={"plan": Plan(drop=["layers.1.mlp"]), "inner": counter})
        made(x)
        count = len(counter)
        for _ in range(3):
            fxfuse.explain(model, x)
        made(x)

        assert len(counter) == count


class TestCaptureErrors:
    @pytest.mark.parametrize("model", [3, "smollm2", torch.relu])
    def test_what_is_no_module_is_refused_by_its_type(self, model: Any) -> None:
        with pytest.raises(CaptureError, match=f"takes an nn.Module .*, not {type(model).__name__}"):
            fxfuse.explain(model, vectors())

    def test_a_call_that_fails_says_why(self) -> None:
        with pytest.raises(CaptureError, match="could not be called and traced") as caught:
            fxfuse.explain(Tower(2), torch.ones(2, 3, 7, dtype=torch.float64))
        assert "7" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_missing_arguments_say_so(self) -> None:
        with pytest.raises(CaptureError, match="missing 1 required positional argument: 'x'"):
            fxfuse.explain(Tower(2))

    def test_a_call_that_gives_no_graph_says_so(self) -> None:
        class Disabled(nn.Module):
            @torch.compiler.disable
            def forward(self, x: Tensor) -> Tensor:
                return x + 1

        with pytest.raises(CaptureError, match="no graph.*disable"):
            fxfuse.explain(Disabled(), vectors())

    def test_after_one_the_model_can_be_explained(self) -> None:
        model = Tower(2)
        with pytest.raises(CaptureError):
            fxfuse.explain(model, torch.ones(2, 3, 7, dtype=torch.float64))

        assert len(fxfuse.explain(model, vectors()).branches) == 2
