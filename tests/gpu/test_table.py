"""Every row of the table of tiles, with each dtype that it serves, against float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fxfuse.hardware.configs import COUNTERS, LOOP_ROWS, Row
from fxfuse.kernels import down, gate_up
from fxfuse.kernels.calls import Down, GateUp
from tests.gpu.here import DEVICE, here
from tests.kernels import reference
from tests.kernels.cases import assert_as_exact, draw, hidden_scale, product_scale, unfused_hidden


@pytest.mark.parametrize(("row", "dtype"), here("gate_up"))
def test_a_row_of_gate_up(row: Row, dtype: torch.dtype) -> None:
    config, more = row.config, 16 if row.aligned else 1
    norm = "eps" if config.rows <= LOOP_ROWS else "rstd"
    sizes = (config.rows + 1,), config.depth * 2 + more, config.columns + more
    case = draw(*sizes, dtype, gain=True, norm=norm).to(DEVICE)
    call = GateUp(case.x, case.gate_up, case.gate_up_bias, case.gain, case.rstd, case.eps, case.activation)
    out = case.x.new_empty(case.x.shape[0], call.width)
    counters = torch.full((COUNTERS,), 7, dtype=torch.int32, device=DEVICE)

    gate_up.launch(call, config, out, counters).run()

    exact = reference.gate_up_act(
        case.x, case.gate_up, case.gate_up_bias, case.gain, case.rstd, case.eps, case.activation
    )
    assert_as_exact(out, unfused_hidden(case), exact, hidden_scale(case))
    assert not counters.any()


@pytest.mark.parametrize(("row", "dtype"), here("down"))
@pytest.mark.parametrize("split", [1, 2])
def test_a_row_of_down(row: Row, dtype: torch.dtype, split: int) -> None:
    config, more = replace(row.config, split=split), 16 if row.aligned else 1
    case = draw((config.rows + 1,), config.columns + more, config.depth * 4 + more, dtype).to(DEVICE)
    hidden = torch.randn(config.rows + 1, case.down.shape[1]).to(DEVICE, dtype)
    call = Down(hidden, case.down, case.residual, case.down_bias)
    out = case.x.new_empty(case.x.shape)
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device=DEVICE)

    down.launch(call, config, out, counters).run()

    assert case.residual is not None
    plain = case.residual + F.linear(hidden, case.down, case.down_bias)
    exact = reference.down_add(hidden, case.down, case.residual, case.down_bias)
    assert_as_exact(out, plain, exact, product_scale(hidden, case.down, case.residual, case.down_bias))
