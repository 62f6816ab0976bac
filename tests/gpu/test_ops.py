"""Whole FFNs against float64: numbers of tokens, odd sizes, every form; the same bits again; gradients."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.hardware.configs import COUNTERS, TABLE, Config
from fxfuse.kernels import down
from fxfuse.kernels.calls import ACTIVATIONS, Down
from tests.gpu.here import DEVICE, GPU, INTERPRETED, down_add, wide_ffn
from tests.kernels import reference
from tests.kernels.cases import (
    DTYPES,
    Case,
    assert_as_exact,
    assert_exact_enough,
    calls,
    draw,
    judged,
    product_scale,
    unfused,
)

# The interpreter takes milliseconds for each program and step.
TOKENS = (1, 5, 16, 64) if INTERPRETED else (1, 5, 16, 64, 300, 2048)
SIZES = {"aligned": (64, 96), "odd": (33, 71)} if INTERPRETED else {"aligned": (768, 2048), "odd": (333, 711)}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_any_number_of_tokens(tokens: int, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    case = draw((judged(tokens),), *sizes, dtype).to(DEVICE)
    assert_exact_enough(torch.cat([wide_ffn(part) for part in calls(case, tokens)]), case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("tokens", [5, 48 if INTERPRETED else 300])
def test_every_activation(activation: str, gated: bool, tokens: int) -> None:
    case = draw((judged(tokens),), *SIZES["aligned"], torch.bfloat16, activation=activation, gated=gated).to(DEVICE)
    assert_exact_enough(torch.cat([wide_ffn(part) for part in calls(case, tokens)]), case)


@pytest.mark.parametrize("norm", ["none", "rstd", "eps"])
@pytest.mark.parametrize("gain", [True, False], ids=["gain", "no gain"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
def test_every_form(norm: str, gain: bool, biases: bool, residual: bool) -> None:
    case = draw((2, 24), *SIZES["aligned"], torch.float16, norm=norm, gain=gain, biases=biases, residual=residual)
    assert_exact_enough(wide_ffn(case.to(DEVICE)), case.to(DEVICE))


SPLIT = [
    replace(row.config, split=split)
    for row in TABLE
    for split in (2, 16)
    if row.kernel == "down" and row.bits == 16 and row.aligned and (INTERPRETED or GPU.arch in row.arch)
]


@pytest.mark.parametrize("config", SPLIT, ids=lambda c: f"{c.rows}x{c.columns}x{c.depth} split {c.split}")
def test_a_split_depth_gives_the_same_bits_in_20_runs(config: Config) -> None:
    width, d = (2048, 48) if INTERPRETED else (8192, 1024)
    case = draw((19,), d, width, torch.bfloat16).to(DEVICE)
    call = Down(torch.randn(19, width).to(DEVICE, torch.bfloat16), case.down, case.residual, case.down_bias)

    def run() -> Tensor:
        out = call.hidden.new_empty(19, d)
        down.launch(call, config, out, torch.zeros(COUNTERS, dtype=torch.int32, device=DEVICE)).run()
        return out

    first = run()
    assert first.isfinite().all()
    for _ in range(1 if INTERPRETED else 20):
        assert torch.equal(run(), first)


def test_a_token_of_zeros_is_no_nan() -> None:
    case = draw((5,), *SIZES["aligned"], torch.bfloat16, biases=False, residual=False).to(DEVICE)
    case.x[1] = 0
    made = wide_ffn(case)
    assert made[1].eq(0).all()
    assert made.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_one_and_stays_in_its_row(activation: str) -> None:
    case = draw((5,), *SIZES["aligned"], torch.bfloat16, activation=activation).to(DEVICE)
    case.x[1, 5] = float("nan")
    made = wide_ffn(case)
    assert made[1].isnan().all()
    assert made[[0, 2, 3, 4]].isfinite().all()


def test_weights_may_have_more_than_two_to_the_31_elements() -> None:
    d, width = 16, 320
    case = draw((3,), d, width, torch.bfloat16).to(DEVICE)
    far = torch.empty(2, width, 2**23, dtype=torch.bfloat16, device=DEVICE)[..., :d]
    far.copy_(case.gate_up)
    assert torch.equal(wide_ffn(replace(case, gate_up=far)), wide_ffn(case))


def test_down_alone() -> None:
    case = draw((7,), *SIZES["aligned"], torch.bfloat16).to(DEVICE)
    hidden = torch.randn(7, case.down.shape[1]).to(DEVICE, torch.bfloat16)
    assert case.residual is not None
    plain = case.residual + F.linear(hidden, case.down, case.down_bias)
    exact = reference.down_add(hidden, case.down, case.residual, case.down_bias)
    scale = product_scale(hidden, case.down, case.residual, case.down_bias)
    assert_as_exact(down_add(Down(hidden, case.down, case.residual, case.down_bias)), plain, exact, scale)


def gradients(case: Case, run: str) -> list[Tensor]:
    """Of the sum of squares, to every tensor; ``run`` is op, plain (torch, op by op) or exact (float64)."""
    to = torch.float64 if run == "exact" else case.x.dtype
    learning = Case(*(e.detach().to(to).requires_grad_() if isinstance(e, Tensor) else e for e in case.arguments))
    way = {"op": lambda c: torch.ops.fxfuse.wide_ffn(*c.arguments), "plain": unfused}
    made = way.get(run, lambda c: reference.wide_ffn(*c.arguments))(learning)
    tensors = [t for f in fields(learning) if isinstance(t := getattr(learning, f.name), Tensor)]
    return list(torch.autograd.grad(made, tensors, torch.full_like(made, 0.5)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_gradients(dtype: torch.dtype, gated: bool) -> None:
    case = draw((48,), *SIZES["aligned"], dtype, gain=True, gated=gated).to(DEVICE)
    made, plain, exact = (gradients(case, run) for run in ("op", "plain", "exact"))
    for mine, theirs, true in zip(made, plain, exact, strict=True):
        assert_as_exact(mine, theirs, true, true)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_a_captured_graph_replays_with_new_tokens(tokens: int) -> None:
    case, other = (draw((tokens,), *SIZES["aligned"], torch.bfloat16, seed=seed).to(DEVICE) for seed in (0, 1))
    wide_ffn(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = wide_ffn(case)
    case.x.copy_(other.x)
    for _ in range(3):
        graph.replay()
        assert torch.equal(made, wide_ffn(case))
