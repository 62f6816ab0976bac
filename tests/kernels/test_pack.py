"""Packing, against the FFNs that were packed."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fxfuse.kernels  # noqa: F401  # registers the ops
from fxfuse.errors import KernelError
from fxfuse.kernels.calls import ACTIVATIONS
from tests.kernels.cases import MODULES
from tests.kernels.packing import pack_bias, pack_down, pack_gate_up

D = 6


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@given(
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    gated=st.booleans(),
    gains=st.booleans(),
    biased=st.lists(st.booleans(), min_size=4, max_size=4),
    activation=st.sampled_from(ACTIVATIONS),
    alignment=st.sampled_from([1, 16]),
)
def test_a_packed_ffn_is_the_sum_of_its_ffns(
    widths: list[int], gated: bool, gains: bool, biased: list[bool], activation: str, alignment: int
) -> None:
    x, count = random(3, D), len(widths)
    gates, ups = [random(width, D) for width in widths], [random(width, D) for width in widths]
    downs = [random(D, width) for width in widths]
    norms = [random(D) if gains else torch.ones(D, dtype=torch.float64) for _ in widths]
    gate_biases = [random(width) if has else None for width, has in zip(widths, biased, strict=False)]
    up_biases = [random(width) if has else None for width, has in zip(widths, biased[::-1], strict=False)]

    wanted = torch.zeros(3, D, dtype=torch.float64)
    for i in range(count):
        hidden = MODULES[activation](F.linear(x * norms[i], gates[i], gate_biases[i]))
        if gated:
            hidden = hidden * F.linear(x * norms[i], ups[i], up_biases[i])
        wanted += F.linear(hidden, downs[i])

    gate_up = pack_gate_up(gates, ups if gated else None, norms if gains else None, alignment)
    bias = pack_bias(gate_biases, up_biases if gated else None, widths, alignment)
    down = pack_down(downs, alignment)
    made = torch.ops.fxfuse.wide_ffn(x, gate_up, down, None, bias, activation=activation)

    assert gate_up.shape == (2 if gated else 1, down.shape[1], D)
    assert gate_up.shape[1] % alignment == 0
    torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-10)


def test_gains_are_multiplied_in_float32_and_rounded_once() -> None:
    weight, gain = torch.randn(50, 32).bfloat16(), torch.randn(32)
    (packed,) = pack_gate_up([weight], None, [gain], alignment=1)
    assert torch.equal(packed, (weight.float() * gain).bfloat16())
    assert not torch.equal(packed, weight * gain.bfloat16())


def test_no_bias_at_all_is_none() -> None:
    assert pack_bias([None, None], [None, None], [3, 4]) is None


def test_gradients_reach_what_was_packed() -> None:
    gates, ups = [random(3, D).requires_grad_() for _ in range(2)], [random(3, D).requires_grad_() for _ in range(2)]
    pack_gate_up(gates, ups, [random(D), random(D)]).sum().backward()
    assert all(weight.grad is not None and weight.grad.ne(0).all() for weight in (*gates, *ups))


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (lambda: pack_gate_up([]), "at least one FFN"),
        (lambda: pack_gate_up([random(3, 4), random(3, 5)]), "one model width"),
        (lambda: pack_gate_up([random(3, 4)], [random(2, 4)]), "same shape"),
        (lambda: pack_gate_up([random(3, 4)], None, [random(3)]), "one gain for each"),
        (lambda: pack_down([random(4, 3), random(5, 3)]), "one model width"),
        (lambda: pack_bias([random(4)], None, [3]), r"widths \[3\]"),
    ],
)
def test_what_does_not_fit_is_named(pack, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        pack()
