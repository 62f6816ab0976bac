"""Linear maps on CPUs: few rows become loops, more go to oneDNN where that is faster, all else stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse import cpu
from fxfuse.backend.frontend import capture
from fxfuse.cpu import PASS, gemm, gemv, race, with_linear_maps
from fxfuse.cpu.gemm import in_float32, other_gemms
from fxfuse.cpu.gemv import LEAST, MAX_ROWS, compiled_loops, few_rows_as_loops, loops_win, measure
from fxfuse.cpu.race import linear_map
from fxfuse.hardware.configs import Gemm

WEIGHT, BIAS = torch.linspace(-1, 1, 24 * 16).view(24, 16).sin(), torch.linspace(-1, 1, 24)


EMPTY = fx.GraphModule({}, fx.Graph())


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1))


def traced(function: Callable[..., Tensor], *args: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*args)


def mapped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def unbiased(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def has_gemm(gm: fx.GraphModule) -> bool:
    return any(node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for node in gm.graph.nodes)


@pytest.fixture
def onednn_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether oneDNN is the faster one, so that it is not up to this machine."""
    return lambda faster: monkeypatch.setattr(gemm, "gemm", lambda size: torch.ops.fxfuse.linear if faster else None)


class Always(dict[Gemm, bool]):
    """What was measured, as if loops had won for every size of few rows."""

    def get(self, size: Gemm, default: object = None) -> bool:  # type: ignore[override]
        return size.M <= MAX_ROWS


@pytest.fixture
def loops_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "_FASTER", Always())
    monkeypatch.setattr(gemv, "measure", lambda gm: None)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", range(1, MAX_ROWS + 1))
@pytest.mark.usefixtures("loops_are_faster")
def test_few_rows_become_sums(count: int, biased: bool) -> None:
    function, args = (mapped, (rows(1, count), WEIGHT, BIAS)) if biased else (unbiased, (rows(1, count), WEIGHT))
    gm = traced(function, *args)

    assert few_rows_as_loops(gm.graph) == 1
    gm.graph.lint()
    gm.recompile()
    assert not has_gemm(gm)
    torch.testing.assert_close(gm(*args), function(*args))


@pytest.mark.parametrize("biased", [False, True])
def test_more_rows_go_to_onednn_where_it_is_faster(biased: bool, onednn_is: Callable[[bool], None]) -> None:
    function, args = (mapped, (rows(2, 5), WEIGHT, BIAS)) if biased else (unbiased, (rows(2, 5), WEIGHT))
    gm = traced(function, *args)

    onednn_is(False)
    assert other_gemms(gm.graph) == 0
    onednn_is(True)
    assert other_gemms(gm.graph) == 1
    gm.graph.lint()
    gm.recompile()
    assert not has_gemm(gm)
    torch.testing.assert_close(gm(*args), function(*args))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (rows(1).double(), WEIGHT.double()),
        (rows(9).double(), WEIGHT.double()),
        (rows(1), WEIGHT.view(16, 24).t()),  # the rows of the weight are not in one piece
        (rows(9), WEIGHT.view(16, 24).t()),
    ],
)
@pytest.mark.usefixtures("loops_are_faster")
def test_others_stay(x: Tensor, weight: Tensor, onednn_is: Callable[[bool], None]) -> None:
    onednn_is(True)
    gm = traced(unbiased, x, weight)

    assert few_rows_as_loops(gm.graph) == 0
    assert other_gemms(gm.graph) == 0
    assert has_gemm(gm)


@pytest.mark.usefixtures("loops_are_faster")
def test_many_rows_are_no_loops() -> None:
    assert few_rows_as_loops(traced(unbiased, rows(MAX_ROWS + 1), WEIGHT).graph) == 0


def test_what_was_not_measured_is_no_loop() -> None:
    assert few_rows_as_loops(traced(unbiased, rows(1, 2), WEIGHT).graph) == 0


@pytest.mark.usefixtures("loops_are_faster")
def test_loops_round_lower_dtypes_once() -> None:
    x, weight, bias = (each.bfloat16() for each in (rows(1, 2), WEIGHT, BIAS))
    gm = traced(mapped, x, weight, bias)

    assert few_rows_as_loops(gm.graph) == 1
    gm.recompile()
    exact = F.linear(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(gm(x, weight, bias), exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("biased", [False, True])
def test_lower_dtypes_are_computed_in_float32_where_that_is_faster(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "gemm", lambda size: in_float32 if size.M > 5 else None)
    x, weight, bias = rows(2, 5).bfloat16(), WEIGHT.bfloat16(), BIAS.bfloat16()
    function, args = (mapped, (x, weight, bias)) if biased else (unbiased, (x, weight))
    gm = traced(function, *args)

    assert other_gemms(gm.graph) == 1
    gm.graph.lint()
    gm.recompile()
    exact = function(*(each.float() for each in args)).bfloat16()
    torch.testing.assert_close(gm(*args), exact, rtol=0, atol=0)
    assert other_gemms(traced(function, x[:1], *args[1:]).graph) == 0


SIZE = linear_map(2, 16, 24, torch.float32)


@pytest.mark.parametrize("win", [gemm.gemm, loops_win])
def test_what_is_faster_is_measured_once(win: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    win.cache_clear()
    found = win(SIZE)

    monkeypatch.setattr(race, "seconds", None)
    assert win(SIZE) is found
    with pytest.raises(TypeError):
        win(replace(SIZE, rows=3))


@pytest.mark.parametrize(("time", "wins"), [(0.5, True), (race.MARGIN + 0.01, False), (2.0, False)])
def test_the_faster_one_is_taken(time: float, wins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "seconds", lambda linear, *_: 1.0 if linear is F.linear else time)

    assert race.wins(torch.mm, F.linear, SIZE) is wins


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, MAX_ROWS])
def test_the_sample_is_the_product(count: int, dtype: torch.dtype) -> None:
    x, weight = rows(count).to(dtype), WEIGHT.to(dtype)
    made = compiled_loops(linear_map(count, 16, 24, dtype))(x, weight)

    torch.testing.assert_close(made, F.linear(x.float(), weight.float()).to(dtype))


def test_linear_maps_of_few_rows_are_measured_before_they_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Gemm] = []
    monkeypatch.setattr(gemv, "_FASTER", {})
    monkeypatch.setattr(gemv, "loops_win", lambda size: asked.append(size) or True)
    side = int(LEAST**0.5)
    model = nn.Sequential(nn.Linear(side, side), nn.Linear(side, side), nn.Linear(side, 2 * side), nn.Linear(2, 2))

    for count in (1, 1, 3, MAX_ROWS + 1):
        (captured,) = capture(model[:3], torch.zeros(1, count, side))
        measure(captured.gm)

    assert asked == [linear_map(count, side, width, torch.float32) for count in (1, 3) for width in (side, 2 * side)]


@pytest.mark.parametrize("bias", [None, BIAS])
def test_the_op_is_what_torch_takes_for_one(bias: Tensor | None) -> None:
    torch.library.opcheck(torch.ops.fxfuse.linear.default, (rows(2, 5), WEIGHT, bias))
    torch.testing.assert_close(torch.ops.fxfuse.linear(rows(2, 5), WEIGHT, bias), F.linear(rows(2, 5), WEIGHT, bias))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """How many products of each graph that inductor compiles become loops, and how many calls of oneDNN."""
    found: list[tuple[int, int]] = []
    call = cpu.LinearMaps.__call__

    def spy(self: cpu.LinearMaps, graph: fx.Graph) -> None:
        call(self, graph)
        sums = graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
        found.append((len(sums), len(graph.find_nodes(op="call_function", target=torch.ops.fxfuse.linear.default))))

    monkeypatch.setattr(cpu.LinearMaps, "__call__", spy)
    with torch.compiler.config.patch(force_disable_caches=True):
        yield found


@pytest.mark.slow
@pytest.mark.usefixtures("loops_are_faster")
@pytest.mark.parametrize(
    ("count", "dynamic", "expected"),
    [(1, False, (2, 0)), (3, False, (6, 0)), (MAX_ROWS + 1, False, (0, 2)), (MAX_ROWS + 1, True, (0, 2))],
)
def test_the_backend(
    count: int,
    dynamic: bool,
    expected: tuple[int, int],
    counted: list[tuple[int, int]],
    onednn_is: Callable[[bool], None],
) -> None:
    onednn_is(True)
    model = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16, bias=False))
    x = rows(1, count)
    compiled = torch.compile(model, backend="ffnfuse", dynamic=dynamic)
    with torch.no_grad():
        found, reference = compiled(x), model.double()(x.double())

    assert counted == [expected]
    torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_trains_is_left_alone(counted: list[tuple[int, int]]) -> None:
    model = nn.Linear(16, 24)
    torch.compile(model, backend="ffnfuse")(rows(1)).sum().backward()

    assert counted == []
    assert model.weight.grad is not None


def test_a_pass_of_the_users_own_keeps_its_place() -> None:
    own = object()

    assert with_linear_maps(EMPTY, {PASS: own}) == {PASS: own}
    with torch._inductor.config.patch({PASS: own}):
        assert with_linear_maps(EMPTY, {"max_autotune": True}) == {"max_autotune": True}


def test_inductors_caches_know_the_pass() -> None:
    one, other = with_linear_maps(EMPTY, {})[PASS], with_linear_maps(EMPTY, {})[PASS]

    assert isinstance(one, CustomGraphPass) and isinstance(other, CustomGraphPass)
    assert one.uuid() and one.uuid() == other.uuid()
