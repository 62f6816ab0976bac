"""Prepacked weights: the same function, made once, never stale, and one for the linear maps of one value."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, fx, nn

import fxfuse
from fxfuse import Plan
from fxfuse._torch import onednn as private
from fxfuse.cpu import onednn, race
from fxfuse.cpu import prepack as module
from fxfuse.cpu.gemm import gemm
from fxfuse.cpu.gemv import compiled_loops, loops_win
from fxfuse.cpu.race import linear_map
from fxfuse.packing import calls as weights
from fxfuse.packing.expressions import PACK
from fxfuse.packing.packs import Pack
from fxfuse.passes.fill_in import FillIn
from fxfuse.passes.runner import run
from tests.models import as_tuple, build, make_input
from tests.models import spec as s
from tests.models.strategies import PlanSpec
from tests.properties.examples import examples
from tests.properties.test_plan import library_plan, planned, planned_models

pytestmark = pytest.mark.skipif(not onednn.computes(torch.float32), reason="this build of PyTorch has no oneDNN")

MEASURED = module.prepacked_wins

OPTIONS: dict[str, Any] = {"prepack": True, "inner": "eager"}


@pytest.fixture(autouse=True)
def always_faster() -> Iterator[None]:
    """Wherever oneDNN can do it at all, so that it is not up to this machine's times, nor to sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "prepacked_wins", lambda size: onednn.computes(size.dtype))
        patch.setattr(module, "LEAST", 0)
        yield


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor with AVX2 and no more, where oneDNN refuses to multiply bfloat16."""
    multiplies = private.multiplies

    def refuse(*_: object) -> None:
        raise RuntimeError("bf16 path needs the cpu support avx512bw")

    monkeypatch.setattr(private, "multiplies", lambda dtype: dtype != torch.bfloat16 and multiplies(dtype))
    for name in ("_reorder_linear_weight", "_linear_pointwise"):
        monkeypatch.setattr(torch.ops.mkldnn, name, refuse)
    gemm.cache_clear()
    yield
    gemm.cache_clear()


class Attention(nn.Module):
    """q, k and v read one value; k alone has a bias, and o reads another value."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=index == 1) for index in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).view(*x.shape[:2], 2, -1).transpose(1, 2) for each in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Conv1D(nn.Module):
    """GPT-2's linear map: a weight ``[in, out]``, by addmm over flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 24) / 4), nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 16), self.weight).view(*x.shape[:-1], 24)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def rows(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(sizes or (2, 3)), 16, generator=torch.Generator().manual_seed(3)).to(dtype)


def compiled(model: Callable[..., Any], **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="ffnfuse", options={**OPTIONS, **options})


def prepacked() -> list[Pack]:
    """The packs that are alive and opaque."""
    gc.collect()
    return [pack for pack in weights._PACKS.values() if pack.tensor.is_mkldnn]


def assert_close(made: Tensor, exact: Tensor) -> None:
    """To the rounding of ``made``'s dtype."""
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[made.dtype]
    torch.testing.assert_close(made.double(), exact, rtol=bound, atol=bound * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "count"), [(Attention, 2), (Conv1D, 1), (ByHand, 1)])
@torch.no_grad()
def test_every_spelling_of_a_linear_map(make: Callable[[], nn.Module], count: int, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    run = compiled(model)

    assert_close(run(rows(dtype=dtype)), copy.deepcopy(model).double()(rows(dtype=dtype).double()))
    assert len(prepacked()) == (count if onednn.computes(dtype) else 0)


@pytest.mark.parametrize("make", [Attention, Conv1D, ByHand])
@pytest.mark.usefixtures("no_bfloat16")
@torch.no_grad()
def test_what_the_processor_cannot_multiply_is_not_prepacked(make: Callable[[], nn.Module]) -> None:
    model = make().bfloat16()
    x = rows(dtype=torch.bfloat16)

    assert_close(compiled(model)(x), copy.deepcopy(model).double()(x.double()))
    assert not prepacked()
    assert not MEASURED.__wrapped__(linear_map(1, 256, 256, torch.bfloat16))
    assert gemm(linear_map(9, 256, 256, torch.bfloat16)) is not torch.ops.fxfuse.linear


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5])
@torch.no_grad()
def test_under_inductor(count: int) -> None:
    model = nn.Sequential(Attention(), nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16, bias=False))
    run = compiled(model, inner="inductor")
    reference = copy.deepcopy(model).double()

    assert_close(run(rows(1, count)), reference(rows(1, count).double()))
    model[1].weight.mul_(2), reference[1].weight.mul_(2)
    assert_close(run(rows(1, count)), reference(rows(1, count).double()))
    assert len(prepacked()) == 4


@given(case=planned_models(max_layers=3))
@examples(15)
@torch.no_grad()
def test_a_planned_model_is_the_planned_model(case: tuple[s.Model, PlanSpec]) -> None:
    spec, plan = case
    model, x = build(spec).float(), make_input(spec)
    reference = copy.deepcopy(model).double()
    inputs = x.float() if x.is_floating_point() else x
    expected = planned(reference, inputs.double() if x.is_floating_point() else x, plan)
    run = compiled(model, plan=library_plan(plan), strict=True)

    for made, exact in zip(as_tuple(run(inputs)), expected, strict=True):
        torch.testing.assert_close(made.double(), exact.double(), rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@torch.no_grad()
def test_a_wide_ffn_has_one_copy_and_no_other() -> None:
    from benchmarks.chain import WIDE, Chain

    model = Chain(16, 24)
    run = compiled(model, plan=WIDE)
    run(rows())
    gc.collect()
    packs = list(weights._PACKS.values())

    assert len(prepacked()) == len(packs) == 2
    assert sum(pack.tensor.numel() for pack in packs) == sum(p.numel() for p in model.parameters() if p.dim() == 2)


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(F.relu(self.up(self.norm(h))))


@torch.no_grad()
def test_the_biases_of_a_wide_ffn_are_packed_too() -> None:
    """They stay packs of their own beside a prepacked weight: no call concatenates, or multiplies with, weights."""
    seen: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
        seen.append(gm)
        return gm

    plan = Plan(parallel=[["0", "1"]])
    model = nn.Sequential(Biased(), Biased())
    made = compiled(model, plan=plan, inner=inner)(rows())

    one, other = copy.deepcopy(model).double()
    h = rows().double()
    assert_close(made, one(h) + other(h) - h)
    targets = [node.target for node in seen[0].graph.nodes]
    assert targets.count(torch.ops.fxfuse.prepacked_linear.default) == 2
    assert torch.cat not in targets and torch.mv not in targets


def in_place(weight: nn.Parameter, new: Tensor) -> None:
    weight.copy_(new)


def by_data(weight: nn.Parameter, new: Tensor) -> None:
    weight.data = new.clone()


@pytest.mark.parametrize("write", [in_place, by_data])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@torch.no_grad()
def test_they_follow_the_weights(write: Callable[[nn.Parameter, Tensor], None], inner: str) -> None:
    model = Attention()
    run = compiled(model, inner=inner)
    before = run(rows())
    for own in (model.k.weight, model.o.weight):
        write(own, own * 2 + 1)
    after = run(rows())

    assert_close(after, copy.deepcopy(model).double()(rows().double()))
    assert not torch.allclose(before, after)


@torch.no_grad()
def test_refresh_packs_anew_what_left_no_trace() -> None:
    model = Attention()
    run = compiled(model)
    run(rows())
    model.o.weight.data.copy_(model.o.weight * 2 + 1)

    assert fxfuse.refresh(model) == 3  # q, k and v in one, their bias, and o
    assert_close(run(rows()), copy.deepcopy(model).double()(rows().double()))


@torch.no_grad()
def test_graphs_share_them() -> None:
    model = Attention()
    run = compiled(model)
    reference = copy.deepcopy(model).double()

    for count in (1, 3, 5, 9):
        assert_close(run(rows(1, count)), reference(rows(1, count).double()))
    assert len(prepacked()) == 2


def test_what_trains_is_left_alone() -> None:
    model = Attention()
    run = compiled(model)
    run(rows()).sum().backward()

    assert not prepacked()
    assert model.k.weight.grad is not None
    with torch.no_grad():
        run(rows())
    assert len(prepacked()) == 2


@torch.no_grad()
def test_autocast_and_float64_are_left_alone() -> None:
    run = compiled(Attention())
    with torch.autocast("cpu", torch.bfloat16):
        assert run(rows()).dtype == torch.bfloat16
    model = Attention().double()

    torch.testing.assert_close(compiled(model)(rows().double()), model(rows().double()))
    assert not prepacked()


@torch.no_grad()
def test_a_value_that_is_overwritten_has_each_reader_to_itself() -> None:
    one, other = nn.Linear(16, 16), nn.Linear(16, 16)

    def function(x: Tensor) -> Tensor:
        h = x * 2
        first = one(h)
        h.mul_(3)
        return first + other(h)

    def reference(x: Tensor) -> Tensor:
        return (one(2 * x) + other(6 * x)).double()

    assert_close(compiled(function)(rows()), reference(rows()))
    assert len(prepacked()) == 2


@torch.no_grad()
def test_what_one_reader_writes_the_others_do_not_see() -> None:
    """The rows of several maps lie in one tensor, as they do not in the model."""
    one, other = nn.Linear(16, 16), nn.Linear(16, 16)
    for parameter in (*one.parameters(), *other.parameters()):
        parameter.data = torch.randint(-8, 9, parameter.shape).float()  # whole numbers: sums in any order are equal

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = one(x), other(x)
        return F.relu_(first), second.view(-1)

    for count in (1, 4):
        x = (4 * rows(1, count)).round()
        made, exact = compiled(function)(x), function(x)
        assert all(map(torch.equal, made, exact))
        assert all(each.is_contiguous() for each in made)


def test_without_onednn_nothing_is_prepacked() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.computes(torch.float32)
        assert not MEASURED.__wrapped__(linear_map(1, 256, 256, torch.float32))


def test_the_report_names_the_weights_and_their_memory() -> None:
    from fxfuse.backend.frontend import capture

    with torch.no_grad():
        (captured,) = capture(Attention(), rows())
    run(captured.gm, FillIn())
    report = module.prepack(captured.gm)

    assert [edit.branches for edit in report.done] == [("q.weight", "k.weight", "v.weight"), ("o.weight",)]
    assert report.done[0].detail == "48 x 16, 0.0 MB"
    assert sum(PACK in node.meta for node in captured.gm.graph.nodes) == 3


@pytest.mark.parametrize("bias", [None, torch.ones(24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op(bias: Tensor | None, dtype: torch.dtype) -> None:
    weight = (torch.arange(24 * 16).view(24, 16) / 100).sin().to(dtype)
    bias = None if bias is None else bias.to(dtype)
    made = torch.ops.fxfuse.prepacked_linear(rows(dtype=dtype), onednn.prepack(weight), bias)

    assert_close(made, F.linear(rows(dtype=dtype), weight, bias).double())


@pytest.mark.parametrize("bias", [None, torch.ones(24)])
@pytest.mark.usefixtures("no_bfloat16")
def test_the_ops_are_pytorchs_own_where_onednn_cannot_multiply(bias: Tensor | None) -> None:
    weight = (torch.arange(24 * 16).view(24, 16) / 100).sin().bfloat16()
    bias = None if bias is None else bias.bfloat16()
    x = rows(dtype=torch.bfloat16)
    exact = F.linear(x, weight, bias)

    assert torch.equal(torch.ops.fxfuse.prepacked_linear(x, onednn.prepack(weight), bias), exact)
    assert torch.equal(torch.ops.fxfuse.linear(x, weight, bias), exact)


def test_the_option_is_checked() -> None:
    with pytest.raises(Exception, match="'prepack' is True or False"):
        compiled(nn.Linear(2, 2), prepack="yes")(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"prepacked": 0.5, "loops": 1.0}, True),
        ({"prepacked": 0.5, "loops": 0.4}, False),
        ({"prepacked": 0.5, "loops": 0.7}, True),
        ({"prepacked": 1.0, "loops": 2.0}, False),
    ],
)
def test_the_fastest_way_wins(times: dict[str, float], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In units of the time that PyTorch takes."""
    size = linear_map(1, 16, 24, torch.float32)

    def seconds(linear: object, *_: object) -> float:
        return {torch.ops.fxfuse.prepacked_linear: times["prepacked"], loops: times["loops"]}.get(linear, 1.0)

    loops = compiled_loops(size)
    monkeypatch.setattr(race, "seconds", seconds)
    loops_win.cache_clear()
    assert MEASURED.__wrapped__(size) is expected
    loops_win.cache_clear()


def test_weights_in_the_cache_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", 16 * 16 + 1)
    run = compiled(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 24)))
    with torch.no_grad():
        run(rows())

    assert [tuple(pack.tensor.shape) for pack in prepacked()] == [(24, 16)]
