"""Kernel 1, interpreted, against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxfuse.hardware.configs import COUNTERS, GROUP, Config, Row
from fxfuse.kernels import gate_up
from fxfuse.kernels.calls import ACTIVATIONS, GateUp
from tests.kernels import reference
from tests.kernels.cases import (
    DTYPES,
    Case,
    assert_as_exact,
    calls,
    draw,
    hidden_scale,
    judged,
    rows,
    unfused_hidden,
)

POINTERS = (Config(16, 16, 16, warps=4, stages=2), Config(32, 16, 64, warps=4, stages=2))
DESCRIPTORS = (Config(16, 16, 16, warps=4, stages=2, tma=True), Config(64, 32, 32, warps=4, stages=2, tma=True))


def run(case: Case, config: Config) -> Tensor:
    call = GateUp(case.x, case.gate_up, case.gate_up_bias, case.gain, case.rstd, case.eps, case.activation)
    out = case.x.new_empty(case.x.shape[0], call.width)
    gate_up.launch(call, config, out).run()
    return out


def check(case: Case, config: Config, count: int | None = None) -> None:
    """``count`` tokens in each call, or all of them."""
    exact = reference.gate_up_act(
        case.x, case.gate_up, case.gate_up_bias, case.gain, case.rstd, case.eps, case.activation
    )
    made = torch.cat([run(part, config) for part in calls(case, count or len(case.x))])
    assert_as_exact(made, unfused_hidden(case), exact, hidden_scale(case))


def cases(count: int, sizes: tuple[int, ...]) -> st.SearchStrategy[Case]:
    return st.builds(
        draw,
        tokens=st.just((judged(count),)),
        d=st.sampled_from(sizes),
        width=st.sampled_from(sizes),
        dtype=st.sampled_from(DTYPES),
        gated=st.booleans(),
        biases=st.booleans(),
        gain=st.booleans(),
        norm=st.sampled_from(["none", "rstd", "eps"]),
        activation=st.sampled_from(ACTIVATIONS),
        seed=st.integers(0, 99),
    )


@pytest.mark.parametrize("count", [1, 2, 17, 37])
@given(st.data(), st.sampled_from(POINTERS))
@settings(max_examples=30)
def test_pointers(count: int, data: st.DataObject, config: Config) -> None:
    check(data.draw(cases(count, (1, 5, 16, 31, 53))), config, count)


@pytest.mark.parametrize("count", [1, 17, 67])
@given(st.data(), st.sampled_from(DESCRIPTORS))
@settings(max_examples=20)
def test_descriptors(count: int, data: st.DataObject, config: Config) -> None:
    check(data.draw(cases(count, (16, 48, 80))), config, count)


def shapes(row: Row) -> tuple[int, int, int]:
    """Tokens, model width and hidden units just over one tile each, aligned if the config needs it."""
    more = 16 if row.aligned else 1
    config = row.config
    return config.rows + 1, config.depth + more, config.columns + more


@pytest.mark.parametrize(("row", "dtype"), rows("gate_up"))
def test_every_config_of_the_table(row: Row, dtype: torch.dtype) -> None:
    tokens, d, width = shapes(row)
    check(draw((tokens,), d, width, dtype, gain=True, norm="eps" if row.config.rows <= 32 else "rstd"), row.config)


@pytest.mark.parametrize("config", [POINTERS[0], DESCRIPTORS[0]], ids=["pointers", "descriptors"])
def test_more_tiles_of_rows_than_go_through_the_columns_together(config: Config) -> None:
    check(draw((16 * (GROUP + 2) + 1,), 16, 48, torch.float32), config)


def test_a_token_of_zeros_is_no_nan() -> None:
    case = draw((3,), 16, 16, torch.bfloat16, biases=False)
    case.x[1] = 0
    made = run(case, POINTERS[0])
    assert made[1].eq(0).all()
    assert made.isfinite().all()


def test_a_nan_stays_one() -> None:
    for activation in ACTIVATIONS:
        case = draw((3,), 16, 16, torch.float32, activation=activation)
        case.x[1, 5] = float("nan")
        made = run(case, POINTERS[0])
        assert made[1].isnan().all(), activation
        assert made[[0, 2]].isfinite().all(), activation


@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize("config", [POINTERS[0], DESCRIPTORS[0]], ids=["pointers", "descriptors"])
def test_counters_are_zeroed(config: Config, tokens: int) -> None:
    case = draw((tokens,), 16, 16, torch.float32)
    call = GateUp(case.x, case.gate_up, eps=1e-6)
    counters = torch.randint(1, 99, (COUNTERS,), dtype=torch.int32)
    gate_up.launch(call, config, case.x.new_empty(tokens, 16), counters).run()
    assert not counters.any()


def test_weights_may_have_more_than_two_to_the_31_elements() -> None:
    case = draw((3,), 16, 320, torch.bfloat16)
    far = torch.empty(2, 320, 2**23, dtype=torch.bfloat16)[..., :16]  # pages that nobody touches cost nothing
    far.copy_(case.gate_up)
    near = run(case, Config(16, 64, 16, warps=4, stages=2))
    call = GateUp(case.x, far, case.gate_up_bias, eps=case.eps)
    out = case.x.new_empty(3, 320)
    gate_up.launch(call, Config(16, 64, 16, warps=4, stages=2), out).run()
    assert torch.equal(out, near)
