"""Matrices quantized in blocks are joined and cut without a change of any number, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfuse.graph.blocks import Blocks, blocks_of, dequantized, inner, is_quantized, join, like, narrow

torchao = pytest.importorskip("torchao.quantization")

CONFIGS: dict[str, tuple[Callable[[], Any], tuple[int, int, bool]]] = {
    "int8": (lambda: torchao.Int8WeightOnlyConfig(), (1, 24, False)),
    "int8 in groups": (lambda: torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(8)), (1, 8, False)),
    "int8 in one block": (lambda: torchao.Int8WeightOnlyConfig(granularity=torchao.PerTensor()), (6, 24, False)),
    "int4 in groups": (lambda: torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(8)), (1, 8, False)),
    "int8 with its inputs": (lambda: torchao.Int8DynamicActivationInt8WeightConfig(), (1, 24, True)),
    "float8": (lambda: torchao.Float8WeightOnlyConfig(), (1, 24, False)),
}
GROUPED = ["int8 in groups", "int4 in groups"]


def matrix(name: str, rows: int = 6, columns: int = 24, seed: int = 0) -> Any:
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight.data = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    torchao.quantize_(linear, CONFIGS[name][0]())
    return linear.weight.data


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_known_by_their_sizes(name: str) -> None:
    found = blocks_of(matrix(name))

    assert isinstance(found, Blocks)
    assert (found.rows, found.columns, found.dynamic) == CONFIGS[name][1]
    assert found == blocks_of(matrix(name, seed=1))
    assert {blocks_of(matrix(other)) for other in CONFIGS if other != name}.isdisjoint({found})


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "int8 in one block"])
def test_joined_rows_hold_the_same_numbers(name: str) -> None:
    one, two = matrix(name), matrix(name, rows=5, seed=1)

    made = join([one, two], 0)
    assert type(made) is type(one)
    assert blocks_of(made) == blocks_of(one)
    assert torch.equal(made.dequantize(), torch.cat([one.dequantize(), two.dequantize()]))
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    apart = [nn.functional.linear(x, each) for each in (one, two)]
    torch.testing.assert_close(nn.functional.linear(x, made), torch.cat(apart, -1))


@pytest.mark.parametrize("name", GROUPED)
def test_joined_columns_hold_the_same_numbers(name: str) -> None:
    one, two = matrix(name), matrix(name, columns=16, seed=1)

    made = join([one, two], 1)
    assert blocks_of(made) == blocks_of(one)
    assert torch.equal(made.dequantize(), torch.cat([one.dequantize(), two.dequantize()], 1))


@pytest.mark.parametrize(("dim", "start", "length"), [(0, 2, 3), (1, 8, 16)])
@pytest.mark.parametrize("name", GROUPED)
def test_a_part_is_a_view_of_its_whole_blocks(name: str, dim: int, start: int, length: int) -> None:
    whole = matrix(name)

    part = narrow(whole, dim, start, length)
    assert torch.equal(part.dequantize(), whole.dequantize().narrow(dim, start, length))
    for held in inner(part):
        held.zero_()
    assert not whole.dequantize().narrow(dim, start, length).any()
    assert whole.dequantize().count_nonzero() > 0


def test_joined_memory_is_its_own() -> None:
    one = matrix("int8")

    made = join([one, one], 0)
    one.qdata.zero_()
    assert made.dequantize().any()


def test_plain_tensors_are_joined_and_taken_as_they_are() -> None:
    plain = torch.ones(2, 3)

    assert torch.equal(join([plain, plain], 1), torch.ones(2, 6))
    assert inner(plain) == (plain,)
    assert dequantized(plain) is plain
    assert not is_quantized(plain)
    assert like(plain, Tensor.neg).sum() == -6


def test_like_keeps_class_and_blocks() -> None:
    one = matrix("int4 in groups")

    made = like(one, torch.zeros_like)
    assert (type(made), blocks_of(made)) == (type(one), blocks_of(one))
    assert not any(held.any() for held in inner(made))


def test_scaled_inputs_are_a_reason() -> None:
    one = matrix("int8")
    one.act_pre_scale = torch.ones(24)

    assert "quantized for inputs that are scaled first (Int8Tensor.act_pre_scale)" in str(blocks_of(one))
