"""Models quantized by torchao under a plan: what they compute, what of them is fused, and what is said where not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import Plan
from fxfuse.report.explanation import BranchInfo
from tests.models.ffns import FFNs
from tests.models.tiny import redraw

torchao = pytest.importorskip("torchao.quantization")

H = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
PLAN = Plan(parallel=[["layers.0.mlp", "layers.1.mlp"]])

Config = Callable[[], Any]

PER_ROW: dict[str, Config] = {
    "int8": lambda: torchao.Int8WeightOnlyConfig(),
    "float8": lambda: torchao.Float8WeightOnlyConfig(),
    "intx a row": lambda: torchao.IntxWeightOnlyConfig(torch.int8, torchao.PerAxis(0)),
}
DYNAMIC: dict[str, Config] = {
    "int8 with its inputs": lambda: torchao.Int8DynamicActivationInt8WeightConfig(),
    "int4 with its inputs": lambda: torchao.Int8DynamicActivationIntxWeightConfig(torch.int4, torchao.PerGroup(8)),
}
GROUPED: dict[str, Config] = {
    "int8 in groups": lambda: torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(8)),
    "int4 in groups": lambda: torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(8)),
}
ALL = PER_ROW | DYNAMIC | GROUPED


class Net(FFNs):
    """A plan lets the first two FFNs read one point; the last one is never quantized.

    What quantizes its inputs would round them in another way after the least difference.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(width=32, hidden=40)
        self.to(dtype).eval().requires_grad_(False)
        redraw(self)


def is_linear(module: nn.Module, _: str) -> bool:
    return isinstance(module, nn.Linear)


def quantized(config: Config, dtype: torch.dtype = torch.float32, fold: bool = True) -> Net:
    model = Net(dtype)
    if fold:
        fxfuse.fold_gains(model, PLAN, H.to(dtype))
    torchao.quantize_(model.layers[:2], config(), is_linear)
    return model


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="ffnfuse", options={"plan": PLAN, "inner": "eager", **options})


def run(model: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    made: Tensor = compiled(model, **options)(H.to(dtype))
    return made


def member(model: nn.Module, dtype: torch.dtype = torch.float32) -> BranchInfo:
    return fxfuse.explain(model, H.to(dtype), plan=PLAN).branches[0]


def dequantized(model: Net) -> Net:
    """The same model in float64, the numbers of its quantized weights written out."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if isinstance(module, nn.Linear) and type(module.weight.data) is not Tensor:
            module.weight = nn.Parameter(module.weight.dequantize().double(), requires_grad=False)
    return made.double()


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "gains of their own"])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_plan_is_exact_on_quantized_weights(name: str, fold: bool) -> None:
    model = quantized(ALL[name], fold=fold)

    torch.testing.assert_close(run(model), model.parallel(H), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_joined_rows_are_the_same_function_in_float64() -> None:
    model = quantized(PER_ROW["int8"])
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(held := module.weight.data, torchao.Int8Tensor):
            parts = held.qdata, held.scale, held.block_size, torch.float64, held.zero_point
            module.weight = nn.Parameter(torchao.Int8Tensor(*parts), requires_grad=False)  # torchao makes none of them
        elif not list(module.children()):
            module.double()

    assert member(model, torch.float64).fused == "gate_up"
    torch.testing.assert_close(run(model, torch.float64), model.parallel(H.double()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [*PER_ROW, *GROUPED])
@torch.no_grad()
def test_the_fused_error_is_at_most_twice_the_unfused_in_bfloat16(name: str) -> None:
    model, h = quantized(ALL[name], torch.bfloat16), H.bfloat16()

    exact = dequantized(model).parallel(h.double())
    fused, unfused = ((made.double() - exact).norm() for made in (run(model, torch.bfloat16), model.parallel(h)))
    assert fused <= 2 * unfused + 1e-6 * exact.norm()


@pytest.mark.parametrize("name", GROUPED)
def test_groups_along_a_row_make_a_wide_ffn(name: str) -> None:
    found = member(quantized(GROUPED[name]))

    assert (found.kind, found.fused, found.reason) == ("gated_ffn", "wide", "")


@pytest.mark.parametrize("name", PER_ROW | DYNAMIC)
def test_scales_of_rows_let_gate_and_up_be_one_and_the_reason_says_why_no_more(name: str) -> None:
    found = member(quantized(ALL[name]))

    assert (found.kind, found.fused) == ("gated_ffn", "gate_up")
    assert re.search("one scale for a whole row|one scale for all hidden units", found.reason)


@pytest.mark.parametrize("name", ALL)
def test_a_gain_that_was_not_folded_is_the_reason(name: str) -> None:
    found = member(quantized(ALL[name], fold=False))

    assert found.fused == ""
    assert "its norm has a gain of its own, which cannot go into quantized weights: fxfuse.fold_gains" in found.reason


def test_one_scale_for_a_whole_weight_is_left_alone() -> None:
    found = member(quantized(lambda: torchao.Int8WeightOnlyConfig(granularity=torchao.PerTensor())))

    assert (found.fused, found.reason) == ("", "its weights are quantized (Int8Tensor) with one scale for several rows")


@pytest.mark.parametrize("sizes", [(8, 4), (8, None)], ids=["other groups", "one is not quantized"])
def test_two_that_are_quantized_in_other_ways_stay_apart(sizes: tuple[int, int | None]) -> None:
    model = Net()
    fxfuse.fold_gains(model, PLAN, H)
    for layer, size in zip(model.layers, sizes, strict=False):
        if size is not None:
            torchao.quantize_(layer, torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(size)), is_linear)

    found = member(model)
    assert (found.fused, "quantized in another way" in found.reason or sizes[1] is None) == ("", True)
    with torch.no_grad():
        torch.testing.assert_close(run(model), model.parallel(H), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"merge_gate_up": True}, {"weights": "share"}, {"verify": True}, {"prepack": True}, {"kernels": "fxfuse"}],
    ids=str,
)
@pytest.mark.parametrize("name", ["int8", "int4 in groups"])
@torch.no_grad()
def test_every_option_leaves_it_exact(name: str, options: dict[str, Any]) -> None:
    model = quantized(ALL[name])

    torch.testing.assert_close(run(model, **options), model.parallel(H), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4 in groups"])
@torch.no_grad()
def test_no_change_of_a_quantized_weight_is_missed(name: str) -> None:
    model = quantized(ALL[name])
    call = compiled(model)
    gate, down = model.layers[1].mlp.gate, model.layers[0].mlp.down

    def check(what: str) -> None:
        torch.testing.assert_close(call(H), model.parallel(H), rtol=1e-5, atol=1e-5, msg=lambda m: f"{what}: {m}")

    check("at first")
    gate.weight.scale.mul_(1.5)
    check("a scale edited in place")
    gate.weight.qdata.data[3] = 7
    check("values written through .data")
    down.weight.scale = down.weight.scale * -1.0
    check("a scale replaced")
    replaced = nn.Linear(down.in_features, down.out_features, bias=False)
    torchao.quantize_(replaced, ALL[name]())
    down.weight.copy_(replaced.weight)
    check("a weight copied into")
    torchao.quantize_(fresh := nn.Linear(down.in_features, down.out_features, bias=False), ALL[name]())
    down.weight = nn.Parameter(fresh.weight, requires_grad=False)
    check("a weight replaced")


@torch.no_grad()
def test_quantized_after_the_model_was_compiled() -> None:
    model = Net()
    fxfuse.fold_gains(model, PLAN, H)
    call = compiled(model)
    torch.testing.assert_close(call(H), model.parallel(H), rtol=1e-5, atol=1e-5)

    torchao.quantize_(model.layers[:2], GROUPED["int8 in groups"](), is_linear)
    torch.testing.assert_close(call(H), model.parallel(H), rtol=1e-5, atol=1e-5)


def test_a_gradient_goes_through_joined_weights() -> None:
    model, (one, two) = quantized(PER_ROW["int8"]), (H.clone().requires_grad_(), H.clone().requires_grad_())

    compiled(model)(one).square().sum().backward()
    model.parallel(two).square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int4 in groups", "int8 with its inputs"])
@torch.no_grad()
def test_inductor_compiles_joined_weights(name: str) -> None:
    model = quantized(ALL[name])

    torch.testing.assert_close(run(model, inner="inductor"), model.parallel(H), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_hidden_units_are_not_taken_out_of_quantized_weights(config: Config) -> None:
    model = Net()
    torchao.quantize_(model.layers[0], config())
    plan = Plan(narrow={"layers.0.mlp": range(8)})
    with pytest.raises(Exception, match=r"PlanError: 'layers\.0\.mlp' cannot be narrowed"):
        torch.compile(model, backend="ffnfuse", options={"plan": plan, "inner": "eager"})(H)
