"""Writes to weights that leave no trace but their values."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fxfuse
from fxfuse import Plan
from fxfuse.packing import calls as weights
from fxfuse.packing import packs as packed
from fxfuse.packing.recipe import Part, Recipe
from tests.models.checks import assert_exact
from tests.models.tiny import Tower, vectors
from tests.packing.test_calls import MODES, Tied, assert_same_gradients, fused, packs, run


@pytest.fixture(autouse=True)
def own_limits() -> Any:
    """The backend raises Dynamo's limits for the process; each test has its own."""
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=False, suppress_errors=False):
        yield


def pairs(model: nn.Module, other: nn.Module) -> list[tuple[Any, Any]]:
    return list(zip(model.parameters(), other.parameters(), strict=True))


def adding(model: nn.Module, other: nn.Module) -> None:
    for own, new in pairs(model, other):
        own.data += new.data


def scaling(model: nn.Module, other: nn.Module) -> None:
    for own, _ in pairs(model, other):
        own.data *= 1.1


def copying(model: nn.Module, other: nn.Module) -> None:
    for own, new in pairs(model, other):
        own.data.copy_(new.data)


def through_numpy(model: nn.Module, other: nn.Module) -> None:
    for own, new in pairs(model, other):
        own.detach().numpy()[...] = new.detach().numpy()


def of_lists(model: nn.Module, other: nn.Module) -> None:
    torch._foreach_lerp_(
        [own.data for own, _ in pairs(model, other)], [new.data for _, new in pairs(model, other)], 0.3
    )


def from_a_vector(model: nn.Module, other: nn.Module) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(other.parameters()), model.parameters())


def by_an_exchange_of_data(model: nn.Module, other: nn.Module) -> None:
    for own, new in pairs(model, other):
        own.data, new.data = new.data, own.data


def by_an_exchange_of_values(model: nn.Module, other: nn.Module) -> None:
    for own, new in pairs(model, other):
        kept = own.data.clone()
        own.data.copy_(new.data)
        new.data.copy_(kept)


def by_swapping(model: nn.Module, other: nn.Module) -> None:
    for own, new in pairs(model, other):
        torch.utils.swap_tensors(own, new)


def with_an_alias(model: nn.Module, other: nn.Module) -> None:
    for own, new in pairs(model, other):
        own.data = own.data  # the same address
        own.data.lerp_(new.data, 0.7)


def in_inference_mode(model: nn.Module, other: nn.Module) -> None:
    with torch.inference_mode():
        for own, new in pairs(model, other):
            own.lerp_(new, 0.4)


def loading_in_inference_mode(model: nn.Module, other: nn.Module) -> None:
    with torch.inference_mode():
        model.load_state_dict(other.state_dict())


def of_a_gain(model: nn.Module, other: nn.Module) -> None:
    next(own for name, own in model.named_parameters() if name.endswith("norm.weight")).data.mul_(1.5)


def of_a_bias(model: nn.Module, other: nn.Module) -> None:
    next(own for name, own in model.named_parameters() if name.endswith("up.bias")).data.add_(1)


def of_a_row(model: nn.Module, other: nn.Module) -> None:
    next(own for own in model.parameters() if own.dim() == 2).data[3] = torch.rand(()).item()


def of_a_column(model: nn.Module, other: nn.Module) -> None:
    next(own for own in model.parameters() if own.dim() == 2).data[:, 5] = torch.rand(()).item()


def of_a_number(model: nn.Module, other: nn.Module) -> None:
    next(own for own in model.parameters() if own.dim() == 2).data[3, 5] += 1


def of_the_transpose(model: nn.Module, other: nn.Module) -> None:
    for layer in model.layers:
        layer.mlp.gate.weight.data.t()[2:5].neg_()


def ordinary(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for own, new in pairs(model, other):
            own.add_(new)


WRITES = [
    adding, scaling, copying, through_numpy, of_lists, from_a_vector, by_an_exchange_of_data, by_an_exchange_of_values,
    by_swapping, with_an_alias, in_inference_mode, loading_in_inference_mode, of_a_gain, of_a_bias, of_a_row,
    of_a_column, of_a_number, of_the_transpose, ordinary,
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
class TestWrites:
    @pytest.mark.parametrize("write", WRITES)
    def test_they_are_noticed_by_the_next_call(self, write: Callable[[Any, Any], None], mode: str) -> None:
        model, x = Tower(3), vectors()
        made = fused(model, mode)
        run(made, x)
        for seed in (5, 6):
            write(model, Tower(3, seed=seed))
            assert_exact([run(made, x)], [model.parallel(x)])
            assert_same_gradients(model, lambda: made(x), lambda: model.parallel(x))

    def test_an_average_swapped_in_and_out_is_followed_by_all_graphs_and_keeps_its_values(self, mode: str) -> None:
        model, average, x = Tower(2), Tower(2, seed=3), vectors()
        made = fused(model, mode)
        calls = (lambda: run(made, x), lambda: made(x).detach())  # two graphs, one without gradients
        for swap in (by_an_exchange_of_data, by_an_exchange_of_values, by_swapping):
            for call in calls:
                call()
            raw, mean = run(model.parallel, x), run(average.parallel, x)
            swap(model, average)
            assert_exact([run(made, x)], [mean])  # one of two graphs sees the average, both see the weights after it
            swap(model, average)
            for call in calls[::-1]:
                assert_exact([call()], [raw])
            assert_exact([run(model.parallel, x), run(average.parallel, x)], [raw, mean])

    def test_a_weight_held_twice_is_followed(self, mode: str) -> None:
        model, x = Tied(), vectors()
        made = fused(model, mode)
        for factor in (1.5, 0.5):
            assert_exact([run(made, x)], [model.parallel(x)])
            model.layers[0].mlp.gate.weight.data *= factor
            model.layers[2].mlp.down.weight.data *= factor
        assert_exact([run(made, x)], [model.parallel(x)])

    def test_weights_that_are_views_of_one_tensor_are_followed(self, mode: str) -> None:
        model, x = Tower(3), vectors()
        matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        whole = torch.randn(len(matrices), 14, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for own, matrix in zip(matrices, whole, strict=True):
            own.data = matrix[1 : 1 + own.shape[0], 3 : 3 + own.shape[1]]
        made = fused(model, mode)
        run(made, x)
        for _ in range(3):
            whole *= 0.9
            assert_exact([run(made, x)], [model.parallel(x)])

    def test_a_square_weight_transposed_where_it_lies_is_noticed(self, mode: str) -> None:
        model, x = Tower(2, hidden=8), vectors()
        made = fused(model, mode)
        run(made, x)
        for layer in model.layers:
            layer.mlp.gate.weight.data = layer.mlp.gate.weight.data.t()
        assert_exact([run(made, x)], [model.parallel(x)])

    def test_layers_compiled_one_by_one_are_followed(self, mode: str) -> None:
        towers = nn.Sequential(Tower(2, seed=1), Tower(2, seed=2), Tower(2, seed=3))
        x = vectors()
        for tower in towers:
            tower.compile(
                backend="ffnfuse", options={"plan": Plan(parallel=[tower.mlps]), "weights": mode, "inner": "eager"}
            )
        for write in (adding, of_a_bias, copying):
            assert_exact([run(towers, x)], [towers[2].parallel(towers[1].parallel(towers[0].parallel(x)))])
            for index, tower in enumerate(towers):
                write(tower, Tower(2, seed=20 + index))
        assert_exact([run(towers, x)], [towers[2].parallel(towers[1].parallel(towers[0].parallel(x)))])

    @pytest.mark.parametrize("write", [adding, of_a_number, of_a_gain])
    def test_gate_and_up_in_one_follow(self, write: Callable[[Any, Any], None], mode: str) -> None:
        model, x = Tower(2), vectors()
        options = {"merge_gate_up": True, "weights": mode, "inner": "eager"}
        made = torch.compile(model, backend="ffnfuse", options=options)
        run(made, x)
        for seed in (1, 2):
            write(model, Tower(2, seed=seed))
            assert_exact([run(made, x)], [run(model, x)])

    def test_under_autocast_weights_are_packed_in_their_own_dtype(self, mode: str) -> None:
        model = Tower(2).float()
        made, x = fused(model, mode), vectors().float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(made, x)

        assert_exact([run(made, x)], [model.parallel(x)], 1e-6)


class InferenceOnly(nn.Module):
    """Weights that are buffers."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        for module in list(tower.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x)


def test_buffers_are_followed() -> None:
    model, x = InferenceOnly(Tower(2)), vectors()
    plan = Plan(parallel=[["tower." + name for name in model.tower.mlps]])
    made = torch.compile(model, backend="ffnfuse", options={"plan": plan, "inner": "eager", "strict": True})
    for _ in range(3):
        assert_exact([run(made, x)], [run(model.tower.parallel, x)])
        for buffer in model.buffers():
            buffer.data *= 1.2


def test_weights_made_and_written_in_inference_mode_are_followed() -> None:
    with torch.inference_mode():
        model, x = Tower(2), vectors()
        made = fused(model, "copy")
        for write in (ordinary, scaling, of_a_number, of_a_gain):
            assert_exact([made(x)], [model.parallel(x)])
            write(model, Tower(2, seed=8))
        assert_exact([made(x)], [model.parallel(x)])


def wide() -> Tower:
    return Tower(2, width=64, hidden=256)


@pytest.mark.parametrize("place", [(3,), (slice(None), 5), (200,), (slice(None), 63)])
@pytest.mark.parametrize("part", ["gate", "down"])
def test_a_row_or_a_column_of_a_large_weight_is_noticed_within_a_round_of_calls(part: str, place: Any) -> None:
    model, x = wide(), vectors(1, 2, 64)
    made = fused(model, "copy")
    run(made, x)
    weight = getattr(model.layers[1].mlp, part).weight
    weight.data[tuple(each if isinstance(each, slice) else each % weight.shape[0] for each in place)] = 0.0
    for _ in range(127):
        run(made, x)

    assert_exact([run(made, x)], [model.parallel(x)])


def test_all_of_a_large_weight_is_noticed_by_the_next_call() -> None:
    model, x = wide(), vectors(1, 2, 64)
    made = fused(model, "copy")
    for part in ("gate", "up", "down") * 10:
        run(made, x)
        getattr(model.layers[0].mlp, part).weight.data *= 1.05
        assert_exact([run(made, x)], [model.parallel(x)])


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@contextmanager
def elapsing() -> Any:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_clock", clock)
        yield clock


def test_one_number_of_a_large_weight_is_noticed_in_time_and_everything_else_with_it() -> None:
    with elapsing() as clock:
        model, x = wide(), vectors(1, 2, 64)
        made = fused(model, "copy")
        run(made, x)
        for layer in model.layers:
            for part in ("gate", "up", "down"):
                getattr(layer.mlp, part).weight.data[17, 29] += 1.0
        assert not torch.allclose(run(made, x), model.parallel(x), atol=1e-12, rtol=0)
        clock.now += 10.0

        assert_exact([run(made, x)], [model.parallel(x)])


def test_whole_parts_are_compared_for_a_small_share_of_the_time() -> None:
    with elapsing() as clock:
        model, x = wide(), vectors(1, 2, 64)
        made = fused(model, "copy")
        run(made, x)
        counted = []
        original = packed.Pack.right

        def right(*args: Any) -> bool:
            counted.append(clock.now)
            clock.now += 0.01
            return original(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packed.Pack, "right", right)
            for _ in range(1000):
                clock.now += 0.1
                run(made, x)

        assert 4 <= len(counted) <= 6  # 110 seconds of calls; 11 milliseconds each
        assert len(packs()) == 4


def test_refresh_leaves_nothing_to_chance() -> None:
    model, x = wide(), vectors(1, 2, 64)
    made = fused(model, "copy")
    run(made, x)
    model.layers[0].mlp.gate.weight.data[17, 29] += 1.0
    assert fxfuse.refresh(model) == 4

    assert_exact([run(made, x)], [model.parallel(x)])


def test_a_backward_pass_after_such_a_write_and_a_call_is_as_in_eager() -> None:
    found = []
    for kind in ("eager", "fused"):
        model, x = Tower(2), vectors()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        given = x.clone().requires_grad_()
        function = model.parallel if kind == "eager" else fused(model, "copy")
        out = function(given).square().sum()
        adding(model, Tower(2, seed=3))
        function(x)
        out.backward()
        found.append(given.grad)

    assert_exact([found[1]], [found[0]])


class TestSwap:
    """``torch.utils.swap_tensors`` refuses tensors that something refers to weakly."""

    @pytest.fixture(autouse=True)
    def _swapping(self) -> Any:
        torch.__future__.set_swap_module_params_on_conversion(True)
        yield
        torch.__future__.set_swap_module_params_on_conversion(False)

    @pytest.mark.parametrize("inner", ["eager", "aot_eager"])
    @pytest.mark.parametrize("mode", MODES)
    def test_conversion_and_loading(self, mode: str, inner: str) -> None:
        model, x = Tower(2), vectors()
        made = fused(model, mode, inner)
        made(x).sum().backward()
        model.zero_grad(set_to_none=True)
        model.load_state_dict(Tower(2, seed=3).state_dict())
        assert_exact([run(made, x)], [model.parallel(x)])
        model.to(torch.float32)
        assert_exact([run(made, x.float())], [model.parallel(x.float())], 1e-5)
        model.to(torch.float64)
        assert_exact([run(made, x)], [model.parallel(x)])
        assert_same_gradients(model, lambda: made(x), lambda: model.parallel(x))

    def test_without_a_plan(self) -> None:
        model, x = Tower(2), vectors()
        made = torch.compile(model, backend="ffnfuse", options={"inner": "eager"})
        run(made, x)
        model.load_state_dict(Tower(2, seed=3).state_dict())

        assert_exact([run(made, x)], [model(x)])

    def test_two_layers_exchange_their_weights(self) -> None:
        model, x = Tower(2), vectors()
        made = fused(model, "copy")
        for _ in range(3):
            run(made, x)
            torch.utils.swap_tensors(model.layers[0].mlp.gate.weight, model.layers[1].mlp.gate.weight)
            assert_exact([run(made, x)], [model.parallel(x)])

    def test_packs_die_with_weights_that_were_swapped(self) -> None:
        model, x = Tower(2), vectors()
        made = fused(model, "copy")
        for seed in range(3):
            run(made, x)
            model.load_state_dict(Tower(2, seed=seed).state_dict())
        run(made, x)
        assert len(packs()) == 4
        for layer in model.layers:
            layer.mlp.gate.weight = nn.Parameter(torch.ones(12, 8, dtype=torch.float64))
        run(made, x)
        assert len(packs()) == 4
        del model, made
        gc.collect()
        assert not packs()


def test_a_packed_model_is_copied_and_pickled_as_before() -> None:
    model, x = Tower(2), vectors()
    made = fused(model, "copy")
    run(made, x)
    file = io.BytesIO()
    torch.save(dict(model.named_parameters()), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(torch.equal(loaded[name], parameter) for name, parameter in model.named_parameters())
    other = copy.deepcopy(model)
    adding(other, Tower(2, seed=4))

    assert_exact([run(made, x), run(fused(other, "copy"), x)], [model.parallel(x), other.parallel(x)])


def per_tensor(weight: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(weight, 0.05, 0, -128, 127)


def per_channel(weight: Tensor) -> Tensor:
    scales = torch.linspace(0.01, 0.1, weight.shape[0])
    return torch.fake_quantize_per_channel_affine(weight, scales, torch.zeros_like(scales, dtype=torch.int32), 0, -8, 7)


def straight_through(weight: Tensor) -> Tensor:
    return weight + (torch.round(weight / 0.05) * 0.05 - weight).detach()


class Quantized(nn.Module):
    def __init__(self, quantize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.quantize = quantize

    def forward(self, weight: Tensor) -> Tensor:
        return self.quantize(weight)


class TestQuantizedWeights:
    @pytest.mark.parametrize("planned", [True, False])
    @pytest.mark.parametrize(
        ("quantize", "dynamic"),
        [(per_tensor, None), (per_tensor, True), (per_channel, None), (straight_through, None)],
    )
    def test_they_are_computed_as_in_eager_with_their_gradients(
        self, planned: bool, quantize: Callable[[Tensor], Tensor], dynamic: bool | None
    ) -> None:
        model, x = Tower(2), vectors()
        for layer in model.layers:
            for name in ("gate", "up", "down"):
                parametrize.register_parametrization(getattr(layer.mlp, name), "weight", Quantized(quantize))
        options: dict[str, Any] = {"plan": Plan(parallel=[model.mlps])} if planned else {"merge_gate_up": True}
        made = torch.compile(model, backend="ffnfuse", options={"inner": "aot_eager", **options}, dynamic=dynamic)
        reference = model.parallel if planned else model
        for _ in range(2):
            assert_exact([run(made, x)], [run(reference, x)])
            assert_same_gradients(model, lambda: made(x), lambda: reference(x))
            scaling(model, model)

    def test_what_cannot_be_run_without_values_is_refused_with_the_reason(self) -> None:
        def fails(*_: object) -> Tensor:
            raise NotImplementedError("no fake impl")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fxfuse.packing.recipe.Recipe.__call__", fails)
            with pytest.raises(Exception, match="PlanError: .*packed: .*no fake impl.*keep their branches out"):
                run(fused(Tower(2), "copy"), vectors())


@settings(max_examples=25, deadline=None)
@given(
    writes=st.lists(st.tuples(st.sampled_from(WRITES), st.integers(0, 9), st.booleans()), min_size=1, max_size=6),
    mode=st.sampled_from(MODES),
)
def test_any_sequence_of_writes_is_followed(writes: list[Any], mode: str) -> None:
    torch._dynamo.reset()
    weights._PACKS.clear()
    model, long = Tower(2), vectors(2, 5, 8)
    made = fused(model, mode)
    others = [Tower(2, seed=seed) for seed in range(10)]
    run(made, long)
    for write, seed, grad in writes:
        write(model, others[seed])
        x = vectors(2, 3, 8) if seed % 2 else long
        if grad:
            assert_same_gradients(model, lambda x=x: made(x), lambda x=x: model.parallel(x))
        else:
            assert_exact([run(made, x)], [run(model.parallel, x)], 1e-8)


def test_a_weight_that_changes_while_it_is_packed_is_packed_again() -> None:
    weight, later = nn.Parameter(torch.ones(2, 3)), torch.full((2, 3), 2.0)

    def compute(members: Sequence[Tensor]) -> Tensor:
        made = 3.0 * members[0]
        weight.data = later  # as another thread may do
        return made

    pack = packed.Pack(Recipe("a weight", (0,), (Part(compute, None, (0,)),), 0, "tripled"), [weight], "copy")
    assert not pack.holds([weight])

    pack.sync([weight])
    assert pack.holds([weight])
    assert torch.equal(pack.tensor, 3 * later)
