"""Linear maps on CPUs: few rows become loops, more go to oneDNN where that is faster, all else stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse import cpu
from fxfuse.cpu import PASS, gemm, with_linear_maps
from fxfuse.cpu.gemm import many_rows_by_onednn, onednn_wins
from fxfuse.cpu.gemv import MAX_ROWS, few_rows_as_loops

WEIGHT, BIAS = torch.linspace(-1, 1, 24 * 16).view(24, 16).sin(), torch.linspace(-1, 1, 24)
FASTER = Callable[[int, int, int, int], bool]


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
    return lambda faster: monkeypatch.setattr(gemm, "onednn_wins", lambda *sizes: faster)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", range(1, MAX_ROWS + 1))
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
    assert many_rows_by_onednn(gm.graph) == 0
    onednn_is(True)
    assert many_rows_by_onednn(gm.graph) == 1
    gm.graph.lint()
    gm.recompile()
    assert not has_gemm(gm)
    torch.testing.assert_close(gm(*args), function(*args))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (rows(1).bfloat16(), WEIGHT.bfloat16()),  # PyTorch has kernels for it
        (rows(9).bfloat16(), WEIGHT.bfloat16()),
        (rows(1).double(), WEIGHT.double()),
        (rows(9).double(), WEIGHT.double()),
        (rows(1), WEIGHT.view(16, 24).t()),  # the rows of the weight are not in one piece
        (rows(9), WEIGHT.view(16, 24).t()),
    ],
)
def test_others_stay(x: Tensor, weight: Tensor, onednn_is: Callable[[bool], None]) -> None:
    onednn_is(True)
    gm = traced(unbiased, x, weight)

    assert few_rows_as_loops(gm.graph) == 0
    assert many_rows_by_onednn(gm.graph) == 0
    assert has_gemm(gm)


def test_many_rows_are_no_loops() -> None:
    assert few_rows_as_loops(traced(unbiased, rows(MAX_ROWS + 1), WEIGHT).graph) == 0


def test_what_is_faster_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn_wins.cache_clear()
    sizes = (7, 16, 24, torch.get_num_threads())
    found = onednn_wins(*sizes)

    monkeypatch.setattr(gemm, "_sampler", None)
    assert onednn_wins(*sizes) is found
    with pytest.raises(TypeError):
        onednn_wins(8, *sizes[1:])


@pytest.mark.parametrize(("seconds", "wins"), [(0.5, True), (gemm.MARGIN + 0.01, False), (2.0, False)])
def test_the_faster_one_is_taken(seconds: float, wins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_sampler", lambda linear, *_: lambda: 1.0 if linear is F.linear else seconds)

    assert onednn_wins.__wrapped__(7, 16, 24, 1) is wins


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

    assert with_linear_maps({PASS: own}) == {PASS: own}
    with torch._inductor.config.patch({PASS: own}):
        assert with_linear_maps({"max_autotune": True}) == {"max_autotune": True}


def test_inductors_caches_know_the_pass() -> None:
    one, other = with_linear_maps({})[PASS], with_linear_maps({})[PASS]

    assert isinstance(one, CustomGraphPass) and isinstance(other, CustomGraphPass)
    assert one.uuid() and one.uuid() == other.uuid()
