from __future__ import annotations

import copy
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
import fxfuse.model.force
from fxfuse import Plan, PlanError
from fxfuse.data.batches import cache_keyword
from fxfuse.errors import OptionError, PruneError
from fxfuse.model.stand_ins import Dropped
from tests.model.test_pruning import attentions, greedy, in_steps, logits
from tests.models.checks import assert_exact
from tests.models.tiny import Counter, Tower, gemma3, llama, planned, tokens, vectors


@pytest.fixture(autouse=True)
def own_limits() -> Any:
    """The backend raises Dynamo's limits for the process; each test has its own."""
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False, suppress_errors=False):
        yield


def mlps(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.mlp" for layer in layers]


def blocks(*layers: int) -> list[list[str]]:
    return [[*attentions(layer), *mlps(layer)] for layer in layers]


FUSION = {"drop": attentions(1, 2), "parallel": [mlps(0, 1, 2)]}
PAIRS = {"parallel": [attentions(1, 2), mlps(1, 2)]}
BLOCKS = {"parallel": [blocks(1, 2)]}
FIRST = {"drop": attentions(0), "parallel": [mlps(0, 1)]}
WINDOWS = {"drop": attentions(0, 2), "parallel": [mlps(0, 1, 2)]}  # the first with a window, and the first without


class TestTheModel:
    def test_it_comes_back_itself_with_its_class_and_the_names_of_its_weights(self) -> None:
        model = llama(3)
        kind, keys = type(model), list(model.state_dict())
        made = fxfuse.apply(model, Plan(drop=attentions(1)), inner="eager")

        assert made is model
        assert type(model) is kind
        assert list(model.state_dict()) == [key for key in keys if not key.startswith("model.layers.1.self_attn")]

    def test_a_sequential_is_one_graph(self) -> None:
        """Dynamo skips the frame of torch's own class."""
        tower, x, compiler = Tower(3), vectors(), Counter()
        model = nn.Sequential(*tower.layers)
        expected = [model[2](model[0](x)), model[0](x)]
        fxfuse.apply(model, Plan(drop=["1.mlp"]), inner=compiler, example=x)

        assert_exact([model(x)], expected[:1])
        assert len(compiler) == 1

        model = nn.Sequential(*Tower(3).layers)
        fxfuse.apply(model, Plan(parallel=[["1.mlp", "2.mlp"]]), inner="eager")
        h, (_, second, third) = expected[1], model
        parallel = h + second.mlp(second.norm(h)) + third.mlp(third.norm(h))
        assert_exact([model(x), copy.deepcopy(model)(x)], [parallel, parallel])

    def test_it_takes_the_path_of_a_plan(self, tmp_path: Path) -> None:
        model, x = Tower(3), vectors()
        Plan(parallel=[model.mlps]).save(tmp_path / "plan.json")
        expected = model.parallel(x)
        fxfuse.apply(model, str(tmp_path / "plan.json"), inner="eager")

        assert_exact([model(x)], [expected])

    def test_a_file_that_changes_after_it_was_applied_changes_nothing(self, tmp_path: Path) -> None:
        model, x = Tower(3), vectors()
        first, _, third = model.layers
        Plan(drop=["layers.1.mlp"]).save(tmp_path / "plan.json")
        fxfuse.apply(model, tmp_path / "plan.json", inner="eager", example=x)
        Plan(drop=["layers.0.mlp"]).save(tmp_path / "plan.json")

        assert_exact([model(x)], [third(first(x))])

    @pytest.mark.parametrize("example", [vectors(), (vectors(),), {"x": vectors()}], ids=["tensor", "tuple", "dict"])
    def test_an_example_call_of_any_form_lets_any_module_drop(self, example: Any) -> None:
        model, x = Tower(3), vectors()
        first, _, third = model.layers
        fxfuse.apply(model, Plan(drop=["layers.1.mlp"]), inner="eager", example=example)

        assert isinstance(model.layers[1].mlp, Dropped)
        assert_exact([model(x)], [third(first(x))])

    def test_a_branch_without_a_module_of_its_own_is_dropped_from_the_graph(self) -> None:
        model, x = Tower(3), vectors()
        model.layers[1].mlp = model.layers[0].mlp  # two branches hold one module: neither has a name of its own
        names = [branch.name for branch in fxfuse.explain(model, x).branches]
        assert names == ["@0", "@1", "layers.2.mlp"]
        expected = model.layers[2](model.layers[0](x))
        fxfuse.apply(model, Plan(drop=["@1"]), inner="eager", strict=True)

        assert_exact([model(x)], [expected])

    def test_other_options_reach_the_backend(self) -> None:
        model, x, counter = Tower(3), vectors(), Counter()
        fxfuse.apply(model, Plan(), inner=counter, merge_gate_up=True)
        model(x)

        assert "merge_gate_up: 3 done" in str([str(report) for report in counter.graphs[0].meta["fxfuse_reports"]])

    def test_applied_again_it_follows_the_new_plan(self) -> None:
        model, x = Tower(4), vectors()
        fxfuse.apply(model, Plan(drop=["layers.1.mlp"]), inner="eager", strict=True, example=x)
        model(x)
        fxfuse.apply(model, Plan(drop=["layers.1.mlp", "layers.2.mlp"]), inner="eager", strict=True, example=x)

        assert_exact([model(x)], [model.layers[3](model.layers[0](x))])

    @pytest.mark.parametrize(
        ("plan", "options", "error"),
        [
            (Plan(drop=["layers.9.mlp"]), {}, PruneError),
            (Plan(drop=["layers.1.mlp"]), {"example": None}, PruneError),
            (Plan(drop=["layers.1"]), {}, PlanError),
            (Plan(drop=["layers.1.mlp"]), {"weights": "both"}, OptionError),
            (Plan(drop=["layers.1.mlp"]), {"wieghts": "copy"}, OptionError),
            ("nowhere.json", {}, PlanError),
        ],
    )
    def test_what_cannot_be_is_an_error_and_the_model_is_as_it_was(
        self, plan: Plan | str, options: dict[str, Any], error: type[Exception]
    ) -> None:
        model, x = Tower(3), vectors()
        modules, expected = dict(model.named_modules()), model(x)
        with pytest.raises(error):
            fxfuse.apply(model, plan, **({"inner": "eager", "example": x} | options))

        assert dict(model.named_modules()) == modules
        assert model._compiled_call_impl is None
        assert torch.equal(model(x), expected)


class TestFailures:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, PlanError])
    @pytest.mark.parametrize(
        ("where", "what"),
        [
            ("fxfuse.model.pruning", "learn"),
            ("fxfuse.model.pruning", "_planned_outputs"),
            ("fxfuse.model.pruning", "_set"),
            ("fxfuse.model.pruning", "_difference"),
            ("fxfuse.backend.applying", "watch_of"),
            ("fxfuse.backend.applying", "_Copier"),
            ("fxfuse.model.force.Watch", "put"),
            ("fxfuse.model.force.Watch", "over"),
            ("fxfuse.model.force.Watch", "remove"),
        ],
    )
    @pytest.mark.parametrize("again", [False, True])
    def test_one_half_way_leaves_the_model_as_it_was(
        self, where: str, what: str, error: type[BaseException], again: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, x = Tower(4), vectors()
        first, second, third, fourth = model.layers
        expected = model(x)
        if again:
            expected = fourth(third(x + first.mlp(first.norm(x)) + second.mlp(second.norm(x))))
            fxfuse.apply(model, Plan(parallel=[model.mlps[:2]]), inner="eager")
        elif what == "remove":
            pytest.skip("there is nothing to remove")
        before = state(model)
        owner: Any = sys.modules.get(where) or fxfuse.model.force.Watch
        real, calls = getattr(owner, what), []

        def fail(*args: Any, **kwargs: Any) -> Any:
            calls.append(what)
            result = real(*args, **kwargs)
            if len(calls) == (2 if what == "_set" else 1):  # two modules leave; all after that puts them back
                raise error
            return result

        monkeypatch.setattr(owner, what, fail)
        with pytest.raises(error):
            fxfuse.apply(
                model, Plan(drop=model.mlps[2:], parallel=[model.mlps[:2]]), inner="eager", example=x, strict=True
            )

        assert state(model) == before
        assert_exact([model(x)], [expected])


def state(model: nn.Module) -> list[Any]:
    """All that makes a module what it is but for its class and its numbers."""
    found = []
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not isinstance(value, dict)}
        own.pop("_is_torch_compile", None)  # torch's mark on whatever it has compiled, here to try the drops
        held = {key: list(value.items()) for key, value in vars(module).items() if isinstance(value, dict)}
        held["_parameters"] = [(key, id(value)) for key, value in module._parameters.items()]
        found.append((name, id(module), own, held))
    return found


class TestCopies:
    def test_a_copy_follows_the_plan_with_weights_of_its_own(self) -> None:
        model, x = llama(3), tokens()
        reference = planned(model, **FIRST)
        fxfuse.apply(model, Plan(**FIRST), inner="eager", strict=True)
        made = copy.deepcopy(copy.deepcopy(model))
        assert_exact([logits(made, x)], [logits(reference, x)])

        for each in (made.model.layers[1].mlp, reference.model.layers[1].layer.mlp):
            torch.nn.init.ones_(each.up_proj.weight)
        assert_exact([logits(made, x)], [logits(reference, x)])
        assert not torch.equal(logits(model, x), logits(made, x))

    def test_so_does_a_copy_of_what_holds_the_model(self) -> None:
        model, x = Tower(3), vectors()
        expected = model.parallel(x)
        fxfuse.apply(model, Plan(parallel=[model.mlps]), inner="eager")

        assert_exact([copy.deepcopy(nn.Sequential(model))(x)], [expected])

    def test_a_copy_can_follow_another_plan_and_the_model_keeps_its_own(self) -> None:
        model, x = Tower(3), vectors()
        apart, parallel = copy.deepcopy(model)(x), model.parallel(x)
        fxfuse.apply(model, Plan(parallel=[model.mlps]), inner="eager")
        made = fxfuse.apply(copy.deepcopy(model), Plan(), inner="eager")

        assert_exact([made(x), copy.deepcopy(made)(x), model(x)], [apart, apart, parallel])

    def test_once_the_model_is_compiled_otherwise_neither_it_nor_its_copies_run_without_the_plan(self) -> None:
        model, x = Tower(3), vectors()
        expected = model(x)
        fxfuse.apply(model, Plan(parallel=[model.mlps]), inner="eager")
        model.compile(backend="eager")
        for each in (model, copy.deepcopy(model)):
            with pytest.raises(PlanError, match="compiled anew since"):
                each(x)

        fxfuse.apply(model, Plan(), inner="eager").compile(backend="eager")
        assert_exact([model(x), copy.deepcopy(model)(x)], [expected, expected])

    def test_a_pickled_one_runs_only_when_the_plan_is_applied_again(self) -> None:
        model, x, file = llama(3), tokens(), io.BytesIO()
        reference = planned(model, **FIRST)
        fxfuse.apply(model, Plan(**FIRST), inner="eager", strict=True)
        torch.save(model, file)
        file.seek(0)
        loaded: Any = torch.load(file, weights_only=False)

        for each in (loaded, copy.deepcopy(loaded)):
            with pytest.raises(PlanError, match="unpickled"):
                logits(each, x)
        fxfuse.apply(loaded, Plan(**FIRST), inner="eager", strict=True)
        assert_exact([logits(loaded, x), logits(copy.deepcopy(loaded), x)], [logits(reference, x)] * 2)


class TestGenerate:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("plan", "kind"),
        [(FUSION, "dynamic"), (FIRST, "static"), (PAIRS, "static"), (BLOCKS, "dynamic")],
        ids=["fusion", "first attention dropped", "layer pairs", "full blocks"],
    )
    def test_a_llama_finds_the_tokens_of_the_reference(self, plan: dict[str, Any], kind: str) -> None:
        self.check(llama(3), plan, kind)

    @pytest.mark.slow
    def test_a_model_with_windows_finds_the_tokens_of_the_reference(self) -> None:
        self.check(gemma3(3, window=5), WINDOWS, "static")

    @staticmethod
    def check(model: Any, plan: dict[str, Any], kind: str) -> None:
        ids = tokens(2, 7)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        reference = planned(model, **plan)
        counter = Counter()
        fxfuse.apply(model, Plan(**plan), inner=counter, strict=True)
        found, expected = (
            greedy(each, ids, attention_mask=mask, cache_implementation=kind, count=5) for each in (model, reference)
        )

        assert torch.equal(found[0], expected[0])
        assert_exact(found[1], expected[1])
        assert len(counter) > 0
        assert all("made parallel" in str(gm.meta["fxfuse_reports"]) for gm in counter.graphs)

    @pytest.mark.slow
    @pytest.mark.parametrize(("make", "plan"), [(llama, FIRST), (gemma3, WINDOWS)], ids=["llama", "windows"])
    def test_a_cache_is_continued_with_several_tokens(self, make: Any, plan: dict[str, Any]) -> None:
        model, ids = make(3), tokens(2, 11)
        reference = planned(model, **plan)
        fxfuse.apply(model, Plan(**plan), inner="eager", strict=True)

        assert_exact(in_steps(model, ids, 6, 5), in_steps(reference, ids, 6, 5))

    @pytest.mark.slow
    def test_a_hand_written_loop_over_a_static_cache(self) -> None:
        from transformers import StaticCache

        model, ids = llama(3), tokens(1, 8)
        reference = planned(model, **FIRST)
        fxfuse.apply(model, Plan(**FIRST), inner="eager", strict=True)
        found: list[list[Tensor]] = []
        for each in (model, reference):
            cache = StaticCache(config=each.config, max_cache_len=16)
            outputs, at = [], 0
            with torch.no_grad():
                for piece in ids.split((6, 2), 1):
                    positions = torch.arange(at, at + piece.shape[1])[None]
                    outputs.append(each(piece, position_ids=positions, **{cache_keyword(each): cache}).logits)
                    at += piece.shape[1]
            found.append(outputs)

        assert_exact(found[0], found[1])


class TestHiddenStates:
    def test_every_reader_sees_the_stream_as_the_plan_leaves_it(self) -> None:
        model, x = Tower(4), vectors()
        first, second, third, fourth = model.layers

        class Tapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = model.layers

            def forward(self, x: Tensor) -> tuple[Tensor, ...]:
                points = [x]
                for layer in self.layers:
                    points.append(layer(points[-1]))
                return tuple(points)

        tapped = fxfuse.apply(Tapped(), Plan(parallel=[["layers.1.mlp", "layers.2.mlp"]]), inner="eager")
        h = first(x)
        both = h + second.mlp(second.norm(h)) + third.mlp(third.norm(h))

        assert_exact(list(tapped(x)), [x, h, both, both, fourth(both)])
