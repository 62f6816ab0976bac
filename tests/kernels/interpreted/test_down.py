"""Kernel 2, interpreted, against its reference; its split depth, in every order of arrival."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxfuse.hardware.configs import COUNTERS, Config, Row
from fxfuse.kernels import down
from fxfuse.kernels.calls import Down
from tests.kernels import reference
from tests.kernels.cases import DTYPES, assert_as_exact, judged, product_scale, rows
from tests.kernels.interpreted.faithful import shuffled

POINTERS = (Config(16, 16, 16, warps=4, stages=2), Config(32, 16, 64, warps=4, stages=2))
DESCRIPTORS = (Config(16, 16, 16, warps=4, stages=2, tma=True), Config(64, 32, 32, warps=4, stages=2, tma=True))
SPLITS = (1, 2, 4)


def draw(M: int, N: int, K: int, dtype: torch.dtype, residual: bool = True, bias: bool = True, seed: int = 0) -> Down:
    made = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made).to(dtype)

    return Down(random(M, K), random(N, K) / K**0.5, random(M, N) if residual else None, random(N) if bias else None)


def run(call: Down, config: Config) -> Tensor:
    out = call.hidden.new_empty(call.hidden.shape[0], call.weight.shape[0])
    down.launch(call, config, out, torch.zeros(COUNTERS, dtype=torch.int32)).run()
    return out


def check(call: Down, config: Config, count: int | None = None) -> None:
    """``count`` tokens in each call, or all of them."""
    plain = F.linear(call.hidden, call.weight, call.bias)
    plain = plain if call.residual is None else call.residual + plain
    exact = reference.down_add(call.hidden, call.weight, call.residual, call.bias)
    scale = product_scale(call.hidden, call.weight, call.residual, call.bias)
    made = torch.cat([run(part, config) for part in parts(call, count or len(call.hidden))])
    assert_as_exact(made, plain, exact, scale)


def parts(call: Down, count: int) -> list[Down]:
    """The tokens of a call in calls of ``count`` each."""
    hidden = call.hidden.split(count)
    residual = [None] * len(hidden) if call.residual is None else call.residual.split(count)
    return [replace(call, hidden=own, residual=its) for own, its in zip(hidden, residual, strict=True)]


def calls(count: int, sizes: tuple[int, ...]) -> st.SearchStrategy[Down]:
    size, flag = st.sampled_from(sizes), st.booleans()
    return st.builds(draw, st.just(judged(count)), size, size, st.sampled_from(DTYPES), flag, flag, st.integers(0, 99))


@pytest.mark.parametrize("count", [1, 2, 17, 37])
@given(st.data(), st.sampled_from(POINTERS), st.sampled_from(SPLITS))
@settings(max_examples=15)
def test_pointers(count: int, data: st.DataObject, config: Config, split: int) -> None:
    check(data.draw(calls(count, (1, 5, 16, 31, 53))), replace(config, split=split), count)


@pytest.mark.parametrize("count", [1, 17, 67])
@given(st.data(), st.sampled_from(DESCRIPTORS), st.sampled_from(SPLITS))
@settings(max_examples=10)
def test_descriptors(count: int, data: st.DataObject, config: Config, split: int) -> None:
    check(data.draw(calls(count, (16, 48, 80))), replace(config, split=split), count)


@pytest.mark.parametrize(("row", "dtype"), rows("down"))
def test_every_config_of_the_table(row: Row, dtype: torch.dtype) -> None:
    config, more = row.config, 16 if row.aligned else 1
    check(draw(config.rows + 1, config.columns + more, config.depth * 2 + more, dtype), replace(config, split=2))


@pytest.mark.parametrize(
    ("split", "dtype"), [(4, torch.float32), (16, torch.float32), (4, torch.bfloat16), (2, torch.float16)]
)
def test_a_split_depth_gives_the_same_bits_in_every_order_of_arrival(split: int, dtype: torch.dtype) -> None:
    call = draw(19, 37, 200, dtype)
    config = replace(POINTERS[0], split=split)
    first = run(call, config)
    for seed in range(5):
        with shuffled(seed):
            assert torch.equal(run(call, config), first), f"order {seed}"


def test_weights_may_have_more_than_two_to_the_31_elements() -> None:
    call = draw(3, 320, 16, torch.bfloat16)
    far = torch.empty(320, 2**23, dtype=torch.bfloat16)[:, :16]  # pages that nobody touches cost nothing
    far.copy_(call.weight)
    config = Config(16, 64, 16, warps=4, stages=2)
    assert torch.equal(run(replace(call, weight=far), config), run(call, config))
