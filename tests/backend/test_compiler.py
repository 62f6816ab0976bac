from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

from fxfuse import Plan, PlanError
from fxfuse.cpu import PASS
from fxfuse.errors import OptionError
from fxfuse.passes import REPORTS
from tests.models.checks import assert_exact
from tests.models.tiny import Counter, Layer, Tower, llama, tokens, vectors


def branches_of(gm: fx.GraphModule, name: str) -> list[tuple[str, ...]]:
    """What the pass ``name`` did to a graph, by branches."""
    return [edit.branches for report in gm.meta[REPORTS] if report.name == name for edit in report.done]


def run(model: Callable[..., Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def compiled(model: Callable[..., Tensor], **options: object) -> Any:
    return torch.compile(model, backend="ffnfuse", options={"inner": "eager", **options})


def without(model: Tower, *dropped: int) -> Callable[[Tensor], Tensor]:
    """The reference of a plan that drops the FFNs of some layers."""

    def forward(x: Tensor) -> Tensor:
        for index, layer in enumerate(model.layers):
            x = x if index in dropped else layer(x)
        return x

    return forward


@pytest.fixture(autouse=True)
def own_limits() -> Any:
    """The backend raises Dynamo's limits for the process; each test has its own."""
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False, suppress_errors=False):
        yield


class TestEntryPoint:
    def test_torch_finds_the_backend_without_an_import_of_fxfuse(self, tmp_path: Path) -> None:
        Plan(drop=["1"]).save(tmp_path / "plan.json")
        script = """
import sys, torch
from torch import nn
class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))
model, x = nn.Sequential(Residual(), Residual(), Residual()), torch.randn(2, 4)
assert not [name for name in sys.modules if name.startswith("fxfuse")]
compiled = torch.compile(model, backend="ffnfuse", options={"plan": sys.argv[1], "inner": "eager"})
torch.testing.assert_close(compiled(x), model[2](model[0](x)))
print("ok")
"""
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "plan.json")],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.stdout == "ok\n", done.stderr


class TestForms:
    def test_torch_compile_of_a_model_follows_the_plan(self) -> None:
        model, x = Tower(3), vectors()
        counter = Counter()
        made = compiled(model, plan=Plan(parallel=[model.mlps]), inner=counter)

        assert_exact([run(made, x)], [model.parallel(x)])
        assert branches_of(counter.graphs[0], "fuse_ffn") == [tuple(model.mlps)]

    def test_model_compile_follows_the_plan_and_leaves_the_names_of_the_weights(self) -> None:
        model, x = Tower(3), vectors()
        keys, expected = list(model.state_dict()), model.parallel(x)
        model.compile(backend="ffnfuse", options={"plan": Plan(parallel=[model.mlps]), "inner": "eager"})

        assert_exact([run(model, x)], [expected])
        assert list(model.state_dict()) == keys

    def test_a_compiled_function_that_closes_over_a_model_follows_the_plan(self) -> None:
        model, x = Tower(3), vectors()
        counter = Counter()

        def step(x: Tensor) -> Tensor:
            return model(x) * 2

        made = compiled(step, plan=Plan(parallel=[model.mlps]), inner=counter)

        assert_exact([run(made, x)], [model.parallel(x) * 2])
        assert branches_of(counter.graphs[0], "fuse_ffn") == [tuple(model.mlps)]

    def test_a_compiled_function_that_takes_a_model_follows_the_plan(self) -> None:
        model, x = Tower(3), vectors()
        made = compiled(lambda model, x: model(x), plan=Plan(drop=["layers.1.mlp"]))

        assert_exact([run(lambda x: made(model, x), x)], [without(model, 1)(x)])

    def test_a_model_inside_the_compiled_one_has_its_full_name(self) -> None:
        model, x = Tower(3), vectors()
        made = compiled(nn.Sequential(nn.Identity(), model), plan=Plan(drop=["1.layers.1.mlp"]), strict=True)

        assert_exact([run(made, x)], [without(model, 1)(x)])

    def test_an_empty_plan_and_none_change_nothing(self) -> None:
        model, x = Tower(3), vectors()

        for plan in (None, Plan()):
            torch._dynamo.reset()
            assert_exact([run(compiled(model, plan=plan), x)], [model(x)])

    def test_the_whole_model_is_one_graph_with_dynamic_shapes_too(self) -> None:
        model, counter = Tower(3), Counter()
        options = {"plan": Plan(parallel=[model.mlps]), "inner": counter}
        made = torch.compile(model, backend="ffnfuse", options=options, fullgraph=True, dynamic=True)

        for length in (3, 5, 9, 200):
            assert_exact([run(made, vectors(2, length, 8))], [model.parallel(vectors(2, length, 8))])
        assert len(counter) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("weights", ["copy", "share"])
    def test_inductor_compiles_the_rewritten_graph(self, weights: str) -> None:
        model, x = Tower(3), vectors()
        options = {"plan": Plan(parallel=[model.mlps[:2]]), "weights": weights}
        made = torch.compile(model, backend="ffnfuse", options=options)
        first, second, third = model.layers
        h = x + first.mlp(first.norm(x)) + second.mlp(second.norm(x))

        assert_exact([run(made, x)], [third(h)])


class TestRegional:
    def test_one_graph_serves_all_layers_each_with_its_own_weights(self) -> None:
        model, x, counter = Tower(4), vectors(), Counter()
        expected = run(model, x)
        for layer in model.layers:
            layer.compile(backend="ffnfuse", options={"merge_gate_up": True, "inner": counter})

        for _ in range(2):
            assert_exact([run(model, x)], [expected])
        assert len(counter) == 1
        assert branches_of(counter.graphs[0], "merge_gate_up") == [("mlp",)]

    def test_each_layer_follows_its_own_weights_when_they_change(self) -> None:
        model, other, x = Tower(4), Tower(4, seed=5), vectors()
        for layer in model.layers:
            layer.compile(backend="ffnfuse", options={"merge_gate_up": True, "inner": "eager"})
        run(model, x)

        for index in (2, 0):
            model.layers[index].load_state_dict(other.layers[index].state_dict())
            expected = x
            for layer in model.layers:
                expected = layer.forward(expected)
            assert_exact([run(model, x)], [expected])

    def test_the_layers_of_a_llama_compiled_one_by_one_compute_what_they_did(self) -> None:
        model, x, counter = llama(3), tokens(2), Counter()
        with torch.no_grad():
            expected = model(x, use_cache=False).logits
            for layer in model.model.layers:
                layer.compile(backend="ffnfuse", options={"merge_gate_up": True, "inner": counter})

            assert_exact([model(x, use_cache=False).logits], [expected])
        assert len(counter) == 1

    def test_a_plan_of_a_layer_speaks_of_the_layers_own_branches(self) -> None:
        model, x = Tower(3), vectors()
        options = {"plan": Plan(drop=["mlp"]), "inner": "eager", "strict": True}
        model.layers[1].compile(backend="ffnfuse", options=options)

        assert_exact([run(model, x)], [without(model, 1)(x)])


class TestHint:
    def test_without_a_plan_one_line_says_what_one_could_do(self, caplog: pytest.LogCaptureFixture) -> None:
        model, x = Tower(3), vectors()
        run(compiled(model), x)

        (record,) = [record for record in caplog.records if record.name.startswith("fxfuse")]
        assert "3 FFNs" in record.getMessage()
        assert 'fxfuse.Plan(parallel=[["layers.1.mlp", "layers.2.mlp"]])' in record.getMessage()
        assert "\n" not in record.getMessage()

    def test_with_a_plan_and_without_a_stream_there_is_no_hint(self, caplog: pytest.LogCaptureFixture) -> None:
        model, x = Tower(3), vectors()
        run(compiled(model, plan=Plan(parallel=[model.mlps])), x)
        run(compiled(nn.Sequential(nn.Linear(8, 8).double(), nn.ReLU())), x)

        assert not [record for record in caplog.records if record.name.startswith("fxfuse")]


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"plann": Plan()}, "OptionError: unknown option 'plann'; nearest: plan"),
            ({"weights": "shared"}, "OptionError: option 'weights' is 'copy' or 'share', not 'shared'"),
            ({"plan": 3}, "OptionError: option 'plan' is a fxfuse.Plan or the path of one, not int"),
            ({"plan": "nowhere.json"}, "PlanError: plan file 'nowhere.json' cannot be read"),
            ({"inner": "inductr"}, "OptionError: option 'inner': no backend 'inductr'; there are"),
            ({"inner": "ffnfuse"}, "OptionError: option 'inner' cannot be 'ffnfuse' itself"),
            ({"strict": 1}, "OptionError: option 'strict' is True or False, not 1"),
        ],
    )
    def test_a_bad_one_is_an_error_whose_first_words_say_so(self, options: dict[str, object], words: str) -> None:
        with pytest.raises(BackendCompilerFailed) as caught:
            run(torch.compile(Tower(2), backend="ffnfuse", options=options), vectors())

        assert str(caught.value).splitlines()[1].startswith(words)
        assert isinstance(caught.value.inner_exception, OptionError | PlanError)

    def test_inductor_gets_its_own_options_and_the_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor import compile_fx

        given: list[dict[str, object]] = []

        def compiler(gm: fx.GraphModule, inputs: list[Tensor], config_patches: dict[str, object]) -> Callable[..., Any]:
            given.append({name: value for name, value in config_patches.items() if name != PASS})
            return gm.forward

        monkeypatch.setattr(compile_fx, "compile_fx", compiler)
        own = {"epilogue_fusion": False}
        mode = "max-autotune-no-cudagraphs"
        run(torch.compile(Tower(2), backend="ffnfuse"), vectors())
        run(torch.compile(Tower(2), backend="ffnfuse", options={"inner_options": own}), vectors())
        run(torch.compile(Tower(2), backend="ffnfuse", mode=mode), vectors())

        assert given == [{}, own, torch._inductor.list_mode_options(mode)]

    def test_the_callers_dict_stays_as_it_is(self, tmp_path: Path) -> None:
        Plan(drop=["layers.0.mlp"]).save(tmp_path / "plan.json")
        options = {"plan": str(tmp_path / "plan.json"), "inner": "eager"}
        before = dict(options)
        run(torch.compile(Tower(2), backend="ffnfuse", options=options), vectors())

        assert options == before
        assert type(options["plan"]) is str


class TestPlanThatChanges:
    @pytest.mark.parametrize("reuse", [True, False], ids=["same dict", "new dict"])
    @pytest.mark.parametrize("in_place", [True, False], ids=["model.compile", "torch.compile"])
    def test_a_changed_file_is_followed_by_the_next_compile(self, reuse: bool, in_place: bool, tmp_path: Path) -> None:
        model, x, path = Tower(3), vectors(), tmp_path / "plan.json"
        options: dict[str, Any] = {"plan": str(path), "inner": "eager"}

        for dropped in (0, 2, 1, 0):
            Plan(drop=[f"layers.{dropped}.mlp"]).save(path)
            given = options if reuse else dict(options)
            made: Callable[..., Tensor] = model
            if in_place:
                model.compile(backend="ffnfuse", options=given)
            else:
                made = torch.compile(model, backend="ffnfuse", options=given)
            assert_exact([run(made, x)], [without(model, dropped)(x)])

    def test_an_unchanged_file_compiles_nothing_anew(self, tmp_path: Path) -> None:
        model, x, counter = Tower(3), vectors(), Counter()
        Plan(drop=["layers.1.mlp"]).save(tmp_path / "plan.json")

        for path in (str(tmp_path / "plan.json"), str(tmp_path / "plan.json"), str(tmp_path / "plan.json")):
            made = torch.compile(model, backend="ffnfuse", options={"plan": path, "inner": counter})
            assert_exact([run(made, x)], [without(model, 1)(x)])
            os.utime(path)
        assert len(counter) == 1

    def test_a_changed_file_does_not_reach_what_is_compiled_already(self, tmp_path: Path) -> None:
        model, counter, path = Tower(3), Counter(), tmp_path / "plan.json"
        Plan(drop=["layers.1.mlp"]).save(path)
        made = torch.compile(model, backend="ffnfuse", options={"plan": str(path), "inner": counter})
        run(made, vectors())
        Plan(drop=["layers.0.mlp"]).save(path)

        for length in (3, 5, 1):
            x = vectors(2, length, 8)
            assert_exact([run(made, x)], [without(model, 1)(x)])
        assert len(counter) > 1

    @pytest.mark.parametrize("in_place", [True, False], ids=["model.compile", "torch.compile"])
    def test_another_plan_in_the_same_dict_is_followed_by_the_next_compile(self, in_place: bool) -> None:
        model, x = Tower(3), vectors()
        options: dict[str, Any] = {"inner": "eager"}

        for dropped in (0, 2, 1):
            options["plan"] = Plan(drop=[f"layers.{dropped}.mlp"])
            made: Callable[..., Tensor] = model
            if in_place:
                model.compile(backend="ffnfuse", options=options)
            else:
                made = torch.compile(model, backend="ffnfuse", options=options)
            assert_exact([run(made, x)], [without(model, dropped)(x)])

    def test_an_equal_plan_compiles_nothing_anew(self) -> None:
        model, x, counter = Tower(3), vectors(), Counter()

        for _ in range(3):
            run(compiled(model, plan=Plan(drop=["layers.1.mlp"]), inner=counter), x)
        assert len(counter) == 1


class BetweenLayers(Tower):
    """A graph break between layers 1 and 2, outside of any loop: two graphs."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](x))
        torch._dynamo.graph_break()
        return self.layers[3](self.layers[2](x))


class InLoop(Tower):
    """A graph break in the loop over layers: Dynamo compiles the layers' own frames."""

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            if index == 1:
                torch._dynamo.graph_break()
            x = layer(x)
        return x


class BrokenLayer(Layer):
    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        torch._dynamo.graph_break()
        return h + self.mlp(x)


class InLayer(Tower):
    """A graph break inside layer 1, between the norm and the FFN."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.layers[1].__class__ = BrokenLayer


BROKEN = [BetweenLayers, InLoop]


class TestGraphBreaks:
    @pytest.mark.parametrize("broken", BROKEN)
    @pytest.mark.parametrize("dropped", [0, 1, 2, 3])
    def test_an_edit_reaches_its_own_layer_and_no_other(self, broken: type[Tower], dropped: int) -> None:
        model, x = broken(4), vectors()
        made = compiled(model, plan=Plan(drop=[f"layers.{dropped}.mlp"]))

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                assert_exact([run(made, x)], [without(model, dropped)(x)])

    @pytest.mark.parametrize("broken", BROKEN)
    def test_names_stay_full(self, broken: type[Tower]) -> None:
        model, x, counter = broken(4), vectors(), Counter()
        run(compiled(model, plan=Plan(drop=model.mlps[1:3]), inner=counter, merge_gate_up=True), x)

        dropped = [name for gm in counter.graphs for names in branches_of(gm, "drop") for name in names]
        assert sorted(dropped) == model.mlps[1:3]

    @pytest.mark.parametrize("dropped", [0, 2, 3])
    def test_an_edit_reaches_its_own_layer_though_another_is_broken(self, dropped: int) -> None:
        model, x = InLayer(4), vectors()

        assert_exact([run(compiled(model, plan=Plan(drop=[f"layers.{dropped}.mlp"])), x)], [without(model, dropped)(x)])

    @pytest.mark.parametrize("plan", [Plan(drop=["layers.1.mlp"]), Plan(parallel=[["layers.1.mlp", "layers.2.mlp"]])])
    def test_an_edit_of_a_branch_that_is_broken_is_an_error_that_names_the_break(self, plan: Plan) -> None:
        with pytest.raises(BackendCompilerFailed, match="PlanError: .*'layers.1.mlp'.*a graph break.*graph_breaks"):
            run(compiled(InLayer(4), plan=plan), vectors())

    @pytest.mark.parametrize("at", [0, 2])
    def test_a_group_between_breaks_is_fused(self, at: int) -> None:
        model, x, counter = BetweenLayers(4), vectors(), Counter()
        made = compiled(model, plan=Plan(parallel=[model.mlps[at : at + 2]]), inner=counter)
        reference = x
        for pair in (0, 2):
            first, second = model.layers[pair : pair + 2]
            if pair == at:
                reference = reference + first.mlp(first.norm(reference)) + second.mlp(second.norm(reference))
            else:
                reference = second(first(reference))

        assert_exact([run(made, x)], [reference])
        assert len(counter) == 2

    @pytest.mark.parametrize("broken", BROKEN)
    def test_a_break_inside_a_group_is_an_error_that_names_the_break(self, broken: type[Tower]) -> None:
        model, x = broken(4), vectors()
        made = compiled(model, plan=Plan(parallel=[model.mlps[1:3]]))

        words = r"PlanError: parallel\[0\]: a graph break separates 'layers"
        with pytest.raises(BackendCompilerFailed, match=words) as caught:
            run(made, x)
        assert "'layers.1.mlp'" in str(caught.value)
        assert "'layers.2.mlp'" in str(caught.value)
        assert "TORCH_LOGS=graph_breaks" in str(caught.value)


@pytest.fixture
def one_process() -> Iterator[None]:
    """The smallest group of processes for DistributedDataParallel."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
class TestDistributed:
    @pytest.mark.parametrize("cap", [25, 0.004], ids=["one bucket", "several buckets"])
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_names_with_and_without_the_wrapper_are_followed(
        self, cap: float, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, x = self.model(cap, monkeypatch)
        made = compiled(self.ddp(model, cap), plan=Plan(drop=[f"{prefix}layers.2.mlp"]), strict=True)

        assert_exact([run(made, x)], [without(model, 2)(x)])

    def test_a_group_in_one_bucket_is_followed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = self.model(25, monkeypatch)
        made = compiled(self.ddp(model, 25), plan=Plan(parallel=[[f"module.{name}" for name in model.mlps]]))

        assert_exact([run(made, x)], [model.parallel(x)])

    def test_a_branch_that_buckets_divide_is_an_error_that_names_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = self.model(0.002, monkeypatch)
        with pytest.raises(BackendCompilerFailed, match="'layers.2.mlp' is no branch.*DDP's gradient buckets"):
            run(compiled(self.ddp(model, 0.002), plan=Plan(drop=["layers.2.mlp"])), x)

    def test_a_group_that_buckets_divide_is_an_error_that_names_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = self.model(0.004, monkeypatch)
        words = "PlanError: .*DDP's gradient buckets.*optimize_ddp = False"
        with pytest.raises(BackendCompilerFailed, match=words) as caught:
            run(compiled(self.ddp(model, 0.004), plan=Plan(parallel=[model.mlps])), x)
        assert "graph break" not in str(caught.value.inner_exception)

    @staticmethod
    def model(cap: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Tower, Tensor]:
        monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1 << 20 if cap > 1 else 1000)
        return Tower(4), vectors()

    @staticmethod
    def ddp(model: Tower, cap: float) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=cap)


class TestNamesThatAreNotThere:
    def test_a_dropped_one_warns_once_with_the_nearest(self) -> None:
        model, x = Tower(3), vectors()
        with pytest.warns(UserWarning, match="fxfuse") as caught:
            out = run(compiled(model, plan=Plan(drop=["layers.1.mpl", "layers.0.mlp"])), x)

        (warning,) = caught
        assert "'layers.1.mpl' is no branch of this graph; nearest: layers.1.mlp" in str(warning.message)
        assert "layers.0.mlp'" not in str(warning.message)
        assert_exact([out], [without(model, 0)(x)])

    def test_all_graphs_of_a_model_warn_once(self) -> None:
        made = compiled(Tower(4), plan=Plan(drop=["layers.1.mpl"]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for length in (3, 5, 1):
                run(made, vectors(2, length, 8))

        assert len([each for each in caught if "fxfuse" in str(each.message)]) == 1

    def test_a_group_none_of_which_is_there_warns(self) -> None:
        model, x = Tower(3), vectors()
        with pytest.warns(UserWarning, match="'layers.7.mlp' is no branch"):
            out = run(compiled(model, plan=Plan(parallel=[["layers.7.mlp", "layers.8.mlp"]])), x)
        assert_exact([out], [model(x)])

    def test_a_group_of_which_a_part_is_there_is_an_error_with_the_nearest(self) -> None:
        made = compiled(Tower(3), plan=Plan(parallel=[["layers.1.mlp", "layers.2.mpl"]]))
        words = r"PlanError: parallel\[0\]: 'layers.2.mpl' is no branch .*nearest: layers.2.mlp"
        with pytest.raises(BackendCompilerFailed, match=words):
            run(made, vectors())

    def test_strict_makes_it_an_error(self) -> None:
        made = compiled(Tower(3), plan=Plan(drop=["layers.1.mpl"]), strict=True)
        words = "PlanError: 'layers.1.mpl' is no branch .*nearest: layers.1.mlp"
        with pytest.raises(BackendCompilerFailed, match=words):
            run(made, vectors())

    def test_strict_lets_names_of_other_graphs_pass(self) -> None:
        model, x = BetweenLayers(4), vectors()
        made = compiled(model, plan=Plan(drop=["layers.0.mlp", "layers.3.mlp"]), strict=True)

        assert_exact([run(made, x)], [without(model, 0, 3)(x)])

    def test_a_graph_without_streams_says_nothing(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(compiled(nn.Linear(8, 8).double(), plan=Plan(drop=["layers.1.mlp"])), vectors())


class TestNeverUnplanned:
    def test_past_the_recompile_limit_there_is_an_error(self) -> None:
        model = Tower(2)
        made = torch.compile(
            model, backend="ffnfuse", dynamic=False, options={"plan": Plan(drop=["layers.0.mlp"]), "inner": "eager"}
        )
        run(made, vectors(1, 2, 8))
        run(made, vectors(1, 3, 8))
        torch._dynamo.config.recompile_limit = 2

        with pytest.raises(FailOnRecompileLimitHit):
            run(made, vectors(1, 4, 8))

    def test_more_graphs_than_torchs_own_limit_follow_the_plan(self) -> None:
        model, counter = Tower(2), Counter()
        options = {"plan": Plan(drop=["layers.0.mlp"]), "inner": counter}
        made = torch.compile(model, backend="ffnfuse", dynamic=False, options=options)

        for length in range(1, 13):
            x = vectors(1, length, 8)
            assert_exact([run(made, x)], [without(model, 0)(x)])
        assert len(counter) == 12

    @pytest.mark.parametrize(
        "plan", [Plan(parallel=[["layers.0.mlp", "layers.9.mlp"]]), "nowhere.json"], ids=["does not fit", "no file"]
    )
    def test_an_error_of_the_plan_is_raised_even_if_errors_are_suppressed(self, plan: Plan | str) -> None:
        torch._dynamo.config.suppress_errors = True

        with pytest.raises(BackendCompilerFailed, match="PlanError"):
            run(compiled(Tower(2), plan=plan), vectors())
