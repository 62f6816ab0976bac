from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import Plan, PlanError
from tests.model.test_pruning import logits
from tests.models.bodies import SwiGLU
from tests.models.checks import assert_exact
from tests.models.tiny import Tower, llama, planned, tokens, vectors

GROUP = Plan(parallel=[["layers.0.mlp", "layers.1.mlp"]])
Way = Callable[[Any, Tensor], Any]


@pytest.fixture(autouse=True)
def own_limits() -> Any:
    """The backend raises Dynamo's limits for the process; each test has its own."""
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False, suppress_errors=False):
        yield


def applied(plan: Plan = GROUP) -> tuple[Tower, Tensor, Tensor]:
    """A tower under a plan, an input, and what the plan makes of it."""
    model, x = Tower(2), vectors()
    expected = model.parallel(x)
    return fxfuse.apply(model, plan, inner="eager"), x, expected  # type: ignore[return-value]  # it is the same object


class Outer(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * 1.0


def looped(model: Any) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        for _ in range(1):
            try:
                x = model(x)
            except ValueError:
                return x
        return x

    return call


def reloaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_stance(model: Any, x: Tensor, stance: str = "force_eager") -> Any:
    with torch.compiler.set_stance(stance):
        return model(x)


def without_dynamo(model: Any, x: Tensor) -> Any:
    with torch._dynamo.config.patch(disable=True):
        return model(x)


def eager(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="eager", **options)


def ffnfuse(function: Any, plan: Plan | None = None) -> Any:
    options: Any = {"inner": "eager", "plan": plan}
    return torch.compile(function, backend="ffnfuse", options=options)


IN_FORCE: dict[str, Way] = {
    "a compiled function": lambda m, x: eager(lambda x: m(x))(x),
    "a loop with a handler": lambda m, x: eager(looped(m))(x),
    "a compiled module": lambda m, x: eager(Outer(m))(x),
    "a compiled Sequential": lambda m, x: eager(nn.Sequential(m))(x),
    "ffnfuse around it": lambda m, x: ffnfuse(Outer(m))(x),
    "ffnfuse around it with the same plan": lambda m, x: ffnfuse(Outer(m), GROUP)(x),
    "compiled": lambda m, x: eager(m)(x),
    "compiled with the same plan": lambda m, x: ffnfuse(m, GROUP)(x),
    "functional_call": lambda m, x: torch.func.functional_call(m, dict(m.named_parameters()), (x,)),
    "disabled": lambda m, x: torch.compiler.disable(m)(x),
    "checkpointed": lambda m, x: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False),
    "a copy in a copied list": lambda m, x: copy.deepcopy({"all": [Outer(m)]})["all"][0](x),
    "a compiled copy": lambda m, x: eager(copy.deepcopy(Outer(m)))(x),
}

REFUSED: dict[str, Way] = {
    "fullgraph": lambda m, x: eager(lambda x: m(x), fullgraph=True)(x),
    "export": lambda m, x: torch.export.export(m, (x,)),
    "strict export": lambda m, x: torch.export.export(m, (x,), strict=True),
    "export of what holds it": lambda m, x: torch.export.export(Outer(m), (x,)),
    "vmap": lambda m, x: torch.func.vmap(m)(x[None]),
    "grad": lambda m, x: torch.func.grad(lambda x: m(x).sum())(x),
    "compiled vmap": lambda m, x: eager(lambda x: torch.func.vmap(m)(x[None]))(x),
    "a stance": in_stance,
    "eager on recompile": lambda m, x: in_stance(m, x, "eager_on_recompile"),
    "Dynamo off": without_dynamo,
    "jit.trace": lambda m, x: torch.jit.trace(m, (x,)),
    "make_fx": lambda m, x: torch.fx.experimental.proxy_tensor.make_fx(m)(x),
    "symbolic_trace": lambda m, x: torch.fx.symbolic_trace(m),
    "its forward": lambda m, x: m.forward(x),
    "a layer of it": lambda m, x: m.layers[0](x),
    "a layer of a copy": lambda m, x: copy.deepcopy(m).layers[0](x),
    "a shallow copy": lambda m, x: copy.copy(m)(x),
    "loaded": lambda m, x: reloaded(m)(x),
    "loaded and compiled": lambda m, x: eager(reloaded(m))(x),
    "loaded and copied": lambda m, x: copy.deepcopy(reloaded(m))(x),
    "compiled with another plan": lambda m, x: ffnfuse(m, Plan(drop=["layers.0.mlp"]))(x),
    "another plan around it": lambda m, x: ffnfuse(Outer(m), Plan(drop=["model.layers.0.mlp"]))(x),
}


@pytest.mark.parametrize("way", IN_FORCE.values(), ids=IN_FORCE)
def test_the_plan_is_in_force(way: Way) -> None:
    model, x, expected = applied()

    assert_exact([way(model, x), model(x)], [expected, expected])


@pytest.mark.parametrize("way", REFUSED.values(), ids=REFUSED)
def test_what_would_run_the_original_code_is_an_error_and_the_model_works_on(way: Way) -> None:
    model, x, expected = applied()
    with pytest.raises(PlanError, match="is not in force where|another plan was applied"):
        way(model, x)
    torch._dynamo.reset()

    assert_exact([model(x)], [expected])


@pytest.mark.parametrize("way", ["module", "function", "argument"])
def test_what_was_compiled_before_the_plan_was_applied_follows_it(way: str) -> None:
    model, x = Tower(2), vectors()
    ways: dict[str, Callable[[], Any]] = {
        "module": lambda: eager(Outer(model)),
        "function": lambda: eager(looped(model)),
    }
    compiled = ways[way]() if way in ways else eager(lambda model, x: model(x))
    call = (lambda model: compiled(model, x)) if way == "argument" else (lambda model: compiled(x))
    plain, expected = call(model), model.parallel(x)
    other = copy.deepcopy(model)
    fxfuse.apply(model, GROUP, inner="eager")

    assert_exact([call(model)], [expected])
    fxfuse.apply(model, Plan(), inner="eager")
    assert_exact([call(model), model.forward(x)], [plain, plain])
    fxfuse.apply(model, GROUP, inner="eager")
    assert_exact([call(model)], [expected])
    if way == "argument":
        assert_exact([call(other)], [plain])


class ByMethod(nn.Module):
    """A layer that computes its branch in a method; the module that is named is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), SwiGLU(bias=True)

    def branch(self, h: Tensor) -> Tensor:
        return self.mlp.down(torch.relu(self.mlp.up(self.norm(h))))


class Methods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ByMethod(), ByMethod()
        self.double()

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.first.branch(h)
        return h + self.second.branch(h)


@pytest.mark.parametrize("way", [in_stance, REFUSED["vmap"], REFUSED["its forward"], REFUSED["export"]])
def test_a_branch_that_is_computed_in_a_method_is_watched(way: Way) -> None:
    model, x = Methods(), vectors()
    expected = x + model.first.branch(x) + model.second.branch(x)
    fxfuse.apply(model, Plan(parallel=[["first.mlp", "second.mlp"]]), inner="eager")

    assert_exact([model(x)], [expected])
    with pytest.raises(PlanError, match="is not in force"):
        way(model, x)


@pytest.mark.parametrize("way", [in_stance, REFUSED["vmap"], REFUSED["loaded"]])
def test_branches_without_a_name_are_watched(way: Way) -> None:
    model, x = Tower(3), vectors()
    model.layers[1].mlp = model.layers[0].mlp  # two branches hold one module: neither has a name of its own
    expected = model.layers[2](model.layers[0](x))
    fxfuse.apply(model, Plan(drop=["@1"]), inner="eager", strict=True)

    assert_exact([model(x), eager(Outer(model))(x)], [expected, expected])
    with pytest.raises(PlanError, match="is not in force"):
        way(model, x)


def test_a_branch_by_itself_may_be_called() -> None:
    model, x, expected = applied()
    first, second = model.layers

    assert_exact([x + first.mlp(first.norm(x)) + second.mlp(second.norm(x))], [expected])


def test_drops_are_in_the_model_itself_and_need_no_watch() -> None:
    model, x = Tower(3), vectors()
    expected = model.layers[2](model.layers[0](x))
    fxfuse.apply(model, Plan(drop=["layers.1.mlp"]), inner="eager", example=x)

    assert_exact([model.forward(x), in_stance(model, x), torch.func.vmap(model)(x[None])[0]], [expected] * 3)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_applied_model_inside_another_one() -> None:
    inner, x, expected = applied()
    outer = nn.Sequential(inner, Tower(2, seed=3))
    after = outer[1].parallel(expected)
    fxfuse.apply(outer, Plan(parallel=[["1.layers.0.mlp", "1.layers.1.mlp"]]), inner="eager")

    assert_exact([outer(x), inner(x)], [after, expected])


def test_looking_at_it_shows_the_original_code() -> None:
    model, x, _ = applied()

    assert [branch.edit for branch in fxfuse.explain(model, x, plan=GROUP).branches] == ["parallel 0"] * 2
    assert all(branch.edit == "" for branch in fxfuse.explain(model, x).branches)


def test_names_and_hooks_of_the_user_stay() -> None:
    model, x = Tower(2), vectors()
    seen: list[str] = []
    keys, expected = list(model.state_dict()), model.parallel(x)
    model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append("called"))
    for _ in range(2):
        fxfuse.apply(model, GROUP, inner="eager")
    assert_exact([model(x)], [expected])

    assert seen == ["called"]
    assert list(model.state_dict()) == keys
    assert [type(model._modules), len(model.layers[0].mlp._forward_pre_hooks)] != [dict, 1]
    fxfuse.apply(model, Plan(), inner="eager")
    assert [type(model._modules), len(model.layers[0].mlp._forward_pre_hooks)] == [dict, 1]


class TestALlama:
    def test_it_generates_as_planned_and_its_parts_refuse(self) -> None:
        model, x = llama(3), tokens(2)
        plan: dict[str, Any] = {"drop": ["model.layers.1.self_attn"]}
        plan["parallel"] = [[f"model.layers.{index}.mlp" for index in range(3)]]
        reference = planned(model, **plan)
        fxfuse.apply(model, Plan(**plan), inner="eager", strict=True)
        assert_exact([logits(model, x), eager(model)(x, use_cache=False).logits], [logits(reference, x)] * 2)

        for part in (model.model, model.model.forward, eager(model.model), model.model.layers[0]):
            with pytest.raises(PlanError, match="is not in force"), torch.no_grad():
                part(x if part is not model.model.layers[0] else model.model.embed_tokens(x))
        found, expected = (each.generate(x, max_new_tokens=4, do_sample=False) for each in (model, reference))
        assert torch.equal(found, expected)
