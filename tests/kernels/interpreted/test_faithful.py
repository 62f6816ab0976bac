"""The patched interpreter, against torch: the other tests are worth as much as this one."""

from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.interpreted.faithful import shuffled


@triton.jit
def convert(source, target, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


@triton.jit
def arithmetic(a_ptr, b_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    index = tl.arange(0, N)
    a, b = tl.load(a_ptr + index), tl.load(b_ptr + index)
    if OP == "add":
        result = a + b
    elif OP == "multiply":
        result = a * b
    elif OP == "maximum":
        result = tl.maximum(a, b)
    else:
        result = (a < b).to(tl.float32)
    tl.store(out_ptr + index, result.to(out_ptr.dtype.element_ty))


@triton.jit
def multiply(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place), input_precision="ieee")
    tl.store(out_ptr + place, product.to(out_ptr.dtype.element_ty))


@triton.jit
def arrive(order, counter):
    tl.store(order + tl.atomic_add(counter, 1), tl.program_id(0) * 3 + tl.program_id(1))


def awkward(count: int = 4096) -> Tensor:
    """float32 values of all sizes, ties between two bfloat16 among them, infinities and a NaN."""
    bits = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    bits[: count // 4] = bits[: count // 4] & ~0xFFFF | 0x8000  # exactly half way
    values = bits.view(torch.float32)
    values[:3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    return values


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_round_as_torch_does(source: torch.dtype, target: torch.dtype) -> None:
    given = awkward().to(source)
    made = torch.empty(given.shape, dtype=target)
    with pytest.warns(RuntimeWarning) if target == torch.float16 != source else nullcontext():
        convert[(1,)](given, made, given.numel())  # numpy warns of what overflows float16
    torch.testing.assert_close(made, given.to(target), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op", ["add", "multiply", "maximum", "less"])
def test_arithmetic_is_on_values(dtype: torch.dtype, op: str) -> None:
    a, b = torch.randn(2, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    made = torch.empty(1024, dtype=dtype)
    arithmetic[(1,)](a, b, made, op, 1024)
    wanted = {"add": a + b, "multiply": a * b, "maximum": a.maximum(b), "less": (a < b).to(dtype)}[op]
    torch.testing.assert_close(made, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_multiplies_values_with_float32_sums(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    made = torch.empty(64, 64)
    multiply[(1,)](a, b, made, 64)
    torch.testing.assert_close(made, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_programs_can_run_in_any_order() -> None:
    orders = []
    for seed in (None, 1, 2):
        order, counter = torch.full((6,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        if seed is None:
            arrive[(2, 3)](order, counter)
        else:
            with shuffled(seed):
                arrive[(2, 3)](order, counter)
        orders.append(order.tolist())
    assert orders[0] == [0, 1, 2, 3, 4, 5]
    assert all(sorted(order) == orders[0] for order in orders)
    assert len({tuple(order) for order in orders}) == 3
