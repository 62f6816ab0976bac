from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import fxfuse
from fxfuse import Plan
from fxfuse.data.batches import cache_keyword, cache_of
from fxfuse.errors import OptionError
from fxfuse.packing import calls as weights
from fxfuse.packing.packs import Pack
from tests.models.checks import assert_exact
from tests.models.tiny import Tower, llama, redraw, tokens, vectors

MODES = ["copy", "share"]


@pytest.fixture(autouse=True)
def own_limits() -> Any:
    """The backend raises Dynamo's limits for the process; each test has its own."""
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False, suppress_errors=False):
        yield


def fused(model: Tower, mode: str, inner: Any = "eager") -> Any:
    """The tower with all its FFNs as one wide FFN."""
    options = {"plan": Plan(parallel=[model.mlps]), "weights": mode, "inner": inner}
    return torch.compile(model, backend="ffnfuse", options=options)


def packs() -> list[Pack]:
    gc.collect()
    return list(weights._PACKS.values())


def run(model: Callable[..., Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


class Concatenations(TorchDispatchMode):
    """Counts the concatenations, and copies into views, of at least as many numbers as a weight of the tower has."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this Dynamo runs the original code for as long as the mode is on."""
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.copy_, torch.ops.aten.stack):
            self.count += out.numel() >= self.size
        return out


def by_state_dict(model: Tower, other: Tower) -> None:
    model.load_state_dict(other.state_dict())


def by_assignment(model: Tower, other: Tower) -> None:
    model.load_state_dict(other.state_dict(), assign=True)


def by_data(model: Tower, other: Tower) -> None:
    for own, new in zip(model.parameters(), other.parameters(), strict=True):
        own.data = new.detach().clone()


def by_new_parameters(model: Tower, other: Tower) -> None:
    for name, new in other.named_parameters():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, nn.Parameter(new.detach().clone()))


def in_place(model: Tower, other: Tower) -> None:
    with torch.no_grad():
        for own, new in zip(model.parameters(), other.parameters(), strict=True):
            own.mul_(0).add_(new)


def into_slices(model: Tower, other: Tower) -> None:
    with torch.no_grad():
        for own, new in zip(model.parameters(), other.parameters(), strict=True):
            own[:1] = new[:1]


def by_refresh(model: Tower, other: Tower) -> None:
    for own, new in zip(model.parameters(), other.parameters(), strict=True):
        own.data.copy_(new.data)
    assert fxfuse.refresh(model) > 0


def by_an_optimizer(model: Tower, other: Tower, **options: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    for own, new in zip(model.parameters(), other.parameters(), strict=True):
        own.grad = new.detach().clone()
    optimizer.step()
    optimizer.zero_grad()


def by_a_fused_optimizer(model: Tower, other: Tower) -> None:
    by_an_optimizer(model, other, fused=True)  # its kernels write weights and leave their versions as they were


def by_a_compiled_function(model: Tower, other: Tower) -> None:
    with torch.no_grad():
        torch.compile(torch._foreach_lerp_, backend="aot_eager")(
            list(model.parameters()), list(other.parameters()), 0.5
        )


def of_one_bias(model: Tower, other: Tower) -> None:
    with torch.no_grad():
        model.layers[1].mlp.up.bias.add_(1.0)


def of_one_gain(model: Tower, other: Tower) -> None:
    with torch.no_grad():
        model.layers[1].norm.weight.add_(1.0)


def of_one_shift(model: Tower, other: Tower) -> None:
    with torch.no_grad():
        model.layers[0].norm.bias.add_(1.0)


def by_swapped_layers(model: Tower, other: Tower) -> None:
    first, second = model.layers[0].mlp, model.layers[1].mlp
    first.gate.weight, second.gate.weight = second.gate.weight, first.gate.weight


CHANGES = [
    by_state_dict, by_assignment, by_data, by_new_parameters, in_place, into_slices, by_refresh, by_an_optimizer,
    by_a_fused_optimizer,
    by_a_compiled_function,
    of_one_bias, of_one_gain, of_one_shift, by_swapped_layers,
]  # fmt: skip


class TestNeverStale:
    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("mode", MODES)
    def test_the_output_follows_every_change(self, change: Callable[[Tower, Tower], None], mode: str) -> None:
        model, x = Tower(3), vectors()
        made = fused(model, mode)
        assert_exact([run(made, x)], [model.parallel(x)])

        for seed in (5, 6):
            before = model.parallel(x)
            change(model, Tower(3, seed=seed))
            after = model.parallel(x)
            assert not torch.allclose(before, after)
            assert_exact([run(made, x)], [after])

    @pytest.mark.parametrize("mode", MODES)
    def test_gradients_follow_every_change_too(self, mode: str) -> None:
        model, x = Tower(3), vectors()
        made = fused(model, mode)
        made(x).sum().backward()

        for change in CHANGES:
            change(model, Tower(3, seed=7))
            assert_same_gradients(model, lambda: made(x), lambda: model.parallel(x))

    @pytest.mark.parametrize("mode", MODES)
    def test_a_new_parameter_at_the_address_of_an_old_one_is_noticed(self, mode: str) -> None:
        model, x = Tower(2), vectors()
        made = fused(model, mode)
        gone: set[int] = set()
        reused = 0
        for step in range(10):
            linear = model.layers[step % 2].mlp.gate
            shape = linear.weight.shape
            gone.add(id(linear.weight))
            del linear.weight
            held = []  # so that the next one has to lie elsewhere, in the end where an old one lay
            for _ in range(1000):
                held.append(nn.Parameter(torch.full(shape, float(step), dtype=torch.float64)))
                if id(held[-1]) in gone:
                    break
            linear.weight = held[-1]
            reused += id(linear.weight) in gone
            del held
            assert_exact([run(made, x)], [model.parallel(x)])
        assert reused, "no identity was used twice, so this test shows nothing"

    @pytest.mark.parametrize("mode", MODES)
    def test_new_data_at_the_address_of_old_data_is_noticed(self, mode: str) -> None:
        model, x = Tower(2), vectors()
        made = fused(model, mode)
        weight = model.layers[0].mlp.up.weight
        for step in range(30):
            weight.data = torch.empty(0, dtype=torch.float64)
            weight.data = torch.full((12, 8), float(step), dtype=torch.float64)
            assert_exact([run(made, x)], [model.parallel(x)])

    @pytest.mark.parametrize("mode", MODES)
    def test_other_dtypes_and_back(self, mode: str) -> None:
        model, x = Tower(3), vectors()
        made = fused(model, mode)
        for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)) * 2:
            model.to(dtype)
            redraw(model, seed=9)
            got = run(made, x.to(dtype))
            assert got.dtype == dtype
            assert_exact([got], [model.parallel(x.to(dtype))], tolerance)

    @pytest.mark.parametrize("mode", MODES)
    def test_two_models_of_one_class_do_not_mix(self, mode: str) -> None:
        one, other, x = Tower(2), Tower(2, seed=4), vectors()
        compiled = [fused(one, mode), fused(other, mode)]
        for _ in range(2):
            assert_exact([run(made, x) for made in compiled], [one.parallel(x), other.parallel(x)])

    @pytest.mark.parametrize("mode", MODES)
    def test_a_copy_of_the_model_has_weights_of_its_own(self, mode: str) -> None:
        model, x = Tower(2), vectors()
        made = fused(model, mode)
        run(made, x)
        other = copy.deepcopy(model)
        in_place(other, Tower(2, seed=8))
        again = fused(other, mode)
        for _ in range(2):
            assert_exact([run(made, x), run(again, x)], [model.parallel(x), other.parallel(x)])
            in_place(model, Tower(2, seed=9))

    @pytest.mark.parametrize("mode", MODES)
    def test_another_plan_of_the_same_weights_does_not_disturb(self, mode: str) -> None:
        model, x = Tower(3), vectors()
        whole = fused(model, mode)
        first, second, third = model.layers
        options = {"plan": Plan(parallel=[model.mlps[1:]]), "weights": mode, "inner": "eager"}
        part = torch.compile(model, backend="ffnfuse", options=options)
        for seed in (1, 2, 3):
            h = first(x)
            expected = h + second.mlp(second.norm(h)) + third.mlp(third.norm(h))
            assert_exact([run(whole, x), run(part, x)], [model.parallel(x), expected])
            in_place(model, Tower(3, seed=seed))

    @pytest.mark.parametrize("mode", MODES)
    def test_after_inference_mode_and_inside_it(self, mode: str) -> None:
        model, x = Tower(2), vectors()
        made = fused(model, mode)
        for change in (in_place, by_data, by_state_dict):
            with torch.inference_mode():
                assert_exact([made(x)], [model.parallel(x)])
            change(model, Tower(2, seed=8))
            assert_exact([run(made, x)], [model.parallel(x)])
            assert_same_gradients(model, lambda: made(x), lambda: model.parallel(x))

    def test_a_model_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            model, other, x = Tower(2), Tower(2, seed=3), vectors()
            made = fused(model, "copy")
            assert_exact([made(x)], [model.parallel(x)])
            by_new_parameters(model, other)
            assert_exact([made(x)], [model.parallel(x)])
            by_data(model, Tower(2, seed=4))
            assert_exact([made(x)], [model.parallel(x)])

    def test_a_model_made_in_inference_mode_cannot_share_its_weights_and_stays_as_it_is(self) -> None:
        with torch.inference_mode():
            model, x = Tower(2), vectors()
            expected = model(x)
            with pytest.raises(OptionError, match="inference_mode.*weights='copy'"):
                fused(model, "share")(x)
            assert torch.equal(model(x), expected)

    def test_refresh_says_how_many_packs_a_model_has(self) -> None:
        model, x = Tower(2), vectors()
        assert fxfuse.refresh(model) == 0
        run(fused(model, "copy"), x)

        assert fxfuse.refresh(model) == 4  # projections and their bias, down and its bias
        assert fxfuse.refresh(Tower(2)) == 0


def assert_same_gradients(model: Tower, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> None:
    """Equal outputs and equal gradients of all parameters, float64 to 1e-10."""
    outputs, gradients = [], []
    for function in (one, other):
        model.zero_grad()
        out = function()
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        outputs.append(out)
        gradients.append([parameter.grad for parameter in model.parameters()])
    model.zero_grad()
    assert_exact([outputs[0]], [outputs[1]])
    for (name, parameter), got, expected in zip(model.named_parameters(), *gradients, strict=True):
        assert (got is None) == (expected is None), name
        assert (expected is None) == (not parameter.requires_grad), name
        if got is not None:
            scale = max(1.0, expected.abs().max().item())
            assert (got - expected).abs().max() <= 1e-10 * scale, name


class TestGradients:
    @pytest.mark.parametrize("inner", ["eager", "aot_eager"])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("mode", MODES)
    def test_they_reach_every_parameter_as_in_eager(self, mode: str, bias: bool, inner: str) -> None:
        model, x = Tower(3, bias=bias), vectors()
        made = fused(model, mode, inner)

        for _ in range(2):
            assert_same_gradients(model, lambda: made(x), lambda: model.parallel(x))

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", MODES)
    def test_they_are_those_of_eager_under_inductor(self, mode: str) -> None:
        model, x = Tower(2), vectors()
        made = fused(model, mode, "inductor")

        for _ in range(2):
            assert_same_gradients(model, lambda: made(x), lambda: model.parallel(x))

    @pytest.mark.parametrize("inner", ["eager", "aot_eager"])
    @pytest.mark.parametrize("mode", MODES)
    def test_they_reach_the_input(self, mode: str, inner: str) -> None:
        model = Tower(2)
        made, found = fused(model, mode, inner), []
        for function in (made, model.parallel):
            x = vectors().requires_grad_()
            function(x).square().sum().backward()
            found.append(x.grad)

        assert_exact([found[0]], [found[1]])

    @pytest.mark.parametrize("frozen", ["gate", "down", "norm", "layers.0", "bias", "up.weight"])
    @pytest.mark.parametrize("mode", MODES)
    def test_frozen_parameters_get_none_and_the_others_theirs(self, mode: str, frozen: str) -> None:
        model, x = Tower(2), vectors()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        made = fused(model, mode, "aot_eager")

        assert_same_gradients(model, lambda: made(x), lambda: model.parallel(x))

    @pytest.mark.parametrize("mode", MODES)
    def test_freezing_and_thawing_is_noticed(self, mode: str) -> None:
        model, x = Tower(2), vectors()
        made = fused(model, mode)
        for need in (True, False, True):
            model.layers[0].requires_grad_(need)
            assert_same_gradients(model, lambda: made(x), lambda: model.parallel(x))

    @pytest.mark.parametrize("mode", MODES)
    def test_they_add_up_over_calls(self, mode: str) -> None:
        model, found = Tower(2), []
        made = fused(model, mode)
        for function in (made, model.parallel):
            model.zero_grad()
            out = function(vectors(seed=1)).square().sum() + function(vectors(seed=2)).square().sum()
            out.backward()
            function(vectors(seed=3)).square().sum().backward()
            found.append([parameter.grad for parameter in model.parameters()])

        assert_exact(found[0], found[1])

    @pytest.mark.parametrize("mode", MODES)
    def test_a_weight_written_between_forward_and_backward_is_an_error_as_in_eager(self, mode: str) -> None:
        model, x = Tower(2), vectors()
        for function in (model.parallel, fused(model, mode)):
            out = function(x).square().sum()
            with torch.no_grad():
                model.layers[0].mlp.down.weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.backward()

    @pytest.mark.parametrize("mode", MODES)
    def test_gate_and_up_in_one_gemm_have_those_of_eager(self, mode: str) -> None:
        model, x = Tower(3), vectors()
        options = {"merge_gate_up": True, "weights": mode, "inner": "aot_eager"}
        made = torch.compile(model, backend="ffnfuse", options=options)

        assert_same_gradients(model, lambda: made(x), lambda: model(x))

    @pytest.mark.parametrize("inner", ["eager", "aot_eager"])
    @pytest.mark.parametrize("mode", MODES)
    def test_nothing_of_the_size_of_a_weight_is_concatenated_or_copied_per_call(self, mode: str, inner: str) -> None:
        # So that no activation is as large as a weight, nor what each call looks at: biases, and samples of weights.
        model, x = Tower(3, width=128, hidden=1024), vectors(1, 1, 128)
        made = fused(model, mode, inner)
        made(x).sum().backward()

        with Concatenations(size=128 * 1024) as seen:
            made(x)
        assert seen.count == 0
        with Concatenations(size=128 * 1024) as seen, torch.no_grad():
            made(x)  # another graph, and the same packs
            made(x)
        assert seen.count == 0

    def test_the_counter_of_concatenations_counts(self) -> None:
        model, x = Tower(2), vectors()
        made = fused(model, "copy")
        run(made, x)
        in_place(model, Tower(2, seed=2))
        with Concatenations(size=8 * 12) as seen:
            run(made, x)

        assert seen.count > 0


class TestTraining:
    @pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    @pytest.mark.parametrize("mode", MODES)
    def test_steps_equal_those_of_eager(self, mode: str, optimizer: Any, options: dict[str, Any]) -> None:
        model, reference = Tower(3), Tower(3)
        made = fused(model, mode, "aot_eager")
        for each, function in ((model, made), (reference, reference.parallel)):
            steps = optimizer(each.parameters(), lr=0.05, **options)
            for step in range(3):
                x, wanted = vectors(seed=10 + step), vectors(seed=20 + step)
                steps.zero_grad(set_to_none=step != 1)
                (function(x) - wanted).square().mean().backward()
                steps.step()

        assert_exact(list(model.parameters()), list(reference.parameters()), 1e-10)
        assert_exact([run(made, vectors())], [run(reference.parallel, vectors())])

    @pytest.mark.parametrize("mode", MODES)
    def test_a_tiny_llama_trains_as_its_reference(self, mode: str) -> None:
        from tests.models.tiny import planned

        group = [["model.layers.0.mlp", "model.layers.1.mlp"]]
        model = llama(2)
        reference = planned(model, parallel=group)
        model.compile(backend="ffnfuse", options={"plan": Plan(parallel=group), "weights": mode, "inner": "aot_eager"})
        ids = tokens(2, 6)
        for each in (model, reference):
            steps = torch.optim.SGD(each.parameters(), lr=0.05)
            for _ in range(3):
                steps.zero_grad()
                each(ids, labels=ids, use_cache=False).loss.backward()
                steps.step()

        # The norms of the model itself compute in float32.
        assert_exact(list(model.parameters()), list(reference.parameters()), 1e-7)


class TestMemory:
    @pytest.mark.parametrize("mode", MODES)
    def test_graphs_of_all_shapes_and_grad_modes_share_their_packs(self, mode: str) -> None:
        model = Tower(2)
        made = fused(model, mode)
        run(made, vectors(2, 5, 8))
        first = {id(pack): pack.tensor.data_ptr() for pack in packs()}
        for length in (1, 7):
            run(made, vectors(2, length, 8))
        made(vectors(2, 1, 8)).sum().backward()
        with torch.inference_mode():
            made(vectors(2, 7, 8))

        assert {id(pack): pack.tensor.data_ptr() for pack in packs()} == first
        assert len(first) == 4

    @pytest.mark.parametrize("mode", MODES)
    def test_prefill_and_decode_of_a_llama_share_one_pack(self, mode: str) -> None:
        model = llama(2)
        group = [["model.layers.0.mlp", "model.layers.1.mlp"]]
        model.compile(backend="ffnfuse", options={"plan": Plan(parallel=group), "weights": mode, "inner": "eager"})
        with torch.no_grad():
            out = model(tokens())
            first = {pack.tensor.data_ptr() for pack in packs()}
            model(tokens(1, 1), **{cache_keyword(model): cache_of(out)})

        assert {pack.tensor.data_ptr() for pack in packs()} == first
        assert len(first) == 2

    def test_a_copy_holds_each_weight_once_more(self) -> None:
        model = Tower(3, bias=False)
        run(fused(model, "copy"), vectors())
        matrices = sum(each.numel() for each in model.parameters() if each.dim() == 2)
        # The projections' bias is what the norms' shifts are through the weights.
        assert sum(pack.tensor.numel() for pack in packs()) == matrices + 3 * 2 * 12

    def test_shared_weights_are_views_of_the_pack_and_there_is_no_other_memory(self) -> None:
        model = Tower(3)
        run(fused(model, "share"), vectors())
        found = {pack.tensor.untyped_storage().data_ptr(): pack.tensor.untyped_storage().nbytes() for pack in packs()}
        projections = [getattr(layer.mlp, part) for layer in model.layers for part in ("gate", "up", "down")]
        shared = [each.weight for each in projections] + [
            getattr(layer.mlp, part).bias for layer in model.layers for part in ("gate", "up")
        ]

        for parameter in shared:
            assert parameter.untyped_storage().data_ptr() in found
        held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.parameters()}
        total = sum(each.numel() * each.element_size() for each in model.parameters())
        assert sum(held.values()) == total
        # What is packed and is no weight itself: the sum of the down projections' biases.
        assert sum((found | held).values()) == total + 8 * 8

    @pytest.mark.parametrize("mode", MODES)
    def test_what_a_call_is_reading_stays_though_another_packs_new_weights_meanwhile(self, mode: str) -> None:
        model, held = Tower(2), list[tuple[Tensor, Tensor]]()

        def inner(gm: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., object]:
            def call(*args: Tensor) -> object:
                if not held:
                    held.extend((arg, arg.clone()) for arg in args if not isinstance(arg, nn.Parameter))
                    model.layers[0].mlp.gate.weight.data = torch.ones_like(model.layers[0].mlp.gate.weight)
                    assert_exact([run(made, vectors())], [model.parallel(vectors())])
                return gm.forward(*args)

            return call

        made = fused(model, mode, inner)
        run(made, vectors())
        assert len(held) > 1
        assert all(torch.equal(now, before) for now, before in held)
        assert_exact([run(made, vectors())], [model.parallel(vectors())])

    @pytest.mark.parametrize("mode", MODES)
    def test_names_shapes_and_values_of_the_weights_stay(self, mode: str) -> None:
        model, other = Tower(2), Tower(2)
        run(fused(model, mode), vectors())

        assert list(model.state_dict()) == list(other.state_dict())
        for name, tensor in model.state_dict().items():
            assert tensor.is_contiguous(), name
            assert torch.equal(tensor, other.state_dict()[name]), name
        assert all(isinstance(each, nn.Parameter) and each.is_leaf for each in model.parameters())

    @pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
    @pytest.mark.parametrize("mode", MODES)
    def test_packs_die_with_the_graphs(self, mode: str, inner: str) -> None:
        model = Tower(2)
        made = fused(model, mode, inner)
        made(vectors()).sum().backward()
        run(made, vectors())
        alive = [weakref.ref(pack.tensor) for pack in packs()]
        assert alive
        del made
        torch._dynamo.reset()
        gc.collect()

        assert not packs()
        assert [ref() for ref in alive if mode == "copy"] == [None] * (len(alive) if mode == "copy" else 0)

    @pytest.mark.parametrize("mode", MODES)
    def test_packs_of_replaced_parameters_die(self, mode: str) -> None:
        model, x = Tower(2), vectors()
        made = fused(model, mode)
        run(made, x)
        count = len(packs())
        for seed in range(5):
            by_assignment(model, Tower(2, seed=seed))
            run(made, x)

        assert len(packs()) == count

    @pytest.mark.parametrize("mode", MODES)
    def test_a_model_dies_when_nobody_holds_it(self, mode: str) -> None:
        model = Tower(2)
        made = fused(model, mode)
        run(made, vectors())
        gone = [weakref.ref(each) for each in model.parameters()]
        del model, made
        gc.collect()

        assert [ref() for ref in gone] == [None] * len(gone)

    def test_a_pack_is_the_same_memory_after_a_change(self) -> None:
        model, x = Tower(2), vectors()
        made = fused(model, "copy")
        run(made, x)
        before = [pack.tensor.data_ptr() for pack in packs()]
        for change in (in_place, by_state_dict, by_data):
            change(model, Tower(2, seed=3))
            run(made, x)

        assert [pack.tensor.data_ptr() for pack in packs()] == before


class Tied(Tower):
    """Two layers that hold one gate."""

    def __init__(self) -> None:
        super().__init__(3)
        self.layers[1].mlp.gate = self.layers[0].mlp.gate


class TestTiedWeights:
    @pytest.mark.parametrize("mode", MODES)
    def test_a_weight_that_two_members_hold_is_followed_and_gets_the_gradients_of_both(self, mode: str) -> None:
        model, x = Tied(), vectors()
        group = ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]
        names = branch_names(model, x)
        made = torch.compile(
            model, backend="ffnfuse",
            options={"plan": Plan(parallel=[names]), "weights": mode, "inner": "eager", "strict": True},
        )  # fmt: skip
        assert len(names) == len(group)

        for seed in (None, 4, 5):
            if seed is not None:
                with torch.no_grad():
                    model.layers[0].mlp.gate.weight.copy_(Tower(3, seed=seed).layers[0].mlp.gate.weight)
            assert_exact([run(made, x)], [model.parallel(x)])
            assert_same_gradients(model, lambda: made(x), lambda: model.parallel(x))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.dropout(weight, 0.5, self.training)


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones((), dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight / self.calls


class TestComputedWeights:
    """Weights that the model itself computes from its parameters, at each call."""

    @pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
    def test_they_are_followed_and_their_parameters_get_their_gradients(
        self, norm: Callable[[nn.Module], object]
    ) -> None:
        model, x = Tower(2), vectors()
        for layer in model.layers:
            norm(layer.mlp.gate)
        made = fused(model, "copy")
        for _ in range(3):
            assert_same_gradients(model, lambda: made(x), lambda: model.parallel(x))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)

    def test_those_that_count_their_calls_change_at_each(self) -> None:
        model, reference, x = Tower(2), Tower(2), vectors()
        for each in (model, reference):
            for layer in each.layers:
                parametrize.register_parametrization(layer.mlp.gate, "weight", Counting())
        made = fused(model, "copy")
        for _ in range(3):
            assert_exact([run(made, x)], [run(reference.parallel, x)])

    @pytest.mark.parametrize("kind", [Halved, Noisy])
    def test_those_that_are_random_are_drawn_at_each_call(self, kind: type[nn.Module]) -> None:
        model, x = Tower(2).train(), vectors()
        for layer in model.layers:
            parametrize.register_parametrization(layer.mlp.gate, "weight", kind())
        made = fused(model, "copy")
        found = [run(made, x) for _ in range(3)]

        assert not torch.allclose(found[0], found[1])
        assert not torch.allclose(found[1], found[2])


def branch_names(model: nn.Module, x: Tensor) -> Sequence[str]:
    return [branch.name for branch in fxfuse.explain(model, x).branches]
