"""The naive references, against modules of torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.kernels import reference
from tests.kernels.cases import MODULES, draw


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_are_those_of_torch(activation: str) -> None:
    v = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    torch.testing.assert_close(reference.ACTIVATIONS[activation](v), MODULES[activation](v), rtol=0, atol=1e-14)


@pytest.mark.parametrize("gated", [True, False])
def test_a_whole_ffn_is_that_of_modules(gated: bool) -> None:
    case = draw((2, 3), 8, 12, torch.float64, gated=gated, gain=True, activation="gelu")
    norm = nn.RMSNorm(8, eps=1e-5, dtype=torch.float64)
    gate, up, down = (nn.Linear(*sizes, dtype=torch.float64) for sizes in ((8, 12), (8, 12), (12, 8)))
    with torch.no_grad():
        norm.weight.copy_(case.gain)
        for linear, weight, bias in [
            (gate, case.gate_up[0], case.gate_up_bias[0]),
            (up, case.gate_up[-1], case.gate_up_bias[-1]),
            (down, case.down, case.down_bias),
        ]:
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        n = norm(case.x)
        hidden = F.gelu(gate(n)) * up(n) if gated else F.gelu(gate(n))
        wanted = case.residual + down(hidden)
    torch.testing.assert_close(reference.wide_ffn(*case.arguments), wanted, rtol=0, atol=1e-12)


def test_precision_float32_computes_in_float32() -> None:
    case = draw((3,), 8, 12, torch.float32)
    made = reference.wide_ffn(*case.arguments, precision=torch.float32)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), reference.wide_ffn(*case.arguments), rtol=0, atol=1e-4)
