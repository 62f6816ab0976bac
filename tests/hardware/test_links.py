"""All-reduces between GPUs: others' measurements, and what is done between and beyond them."""

import pytest

from fxfuse.errors import KernelError
from fxfuse.hardware.gpus import find
from fxfuse.hardware.links import ALL_REDUCE, all_reduce, between

H100 = find("h100")


@pytest.mark.parametrize("count", [2, 4, 8])
def test_measured_sizes_are_what_was_measured(count: int) -> None:
    for size, seconds in ALL_REDUCE[count].items():
        assert all_reduce(size, count, H100) == pytest.approx(seconds)


def test_between_and_beyond_the_table() -> None:
    table = {100: 1.0, 200: 3.0}
    sizes = [0, 100, 150, 200, 250, 1000]
    assert [between(size, table, rate=100.0) for size in sizes] == [1.0, 1.0, 2.0, 3.0, 3.0, 10.0]


def test_one_gpu_adds_up_nothing() -> None:
    assert all_reduce(1e9, 1, find("a10")) == 0


def test_a_slower_link_moves_bytes_more_slowly_and_starts_alike() -> None:
    a100, small, large = find("a100"), 4096, 1e9
    assert all_reduce(small, 8, a100) == pytest.approx(all_reduce(small, 8, H100))
    assert all_reduce(large, 8, a100) / all_reduce(large, 8, H100) == pytest.approx(900 / 600, rel=1e-2)


def test_what_nobody_measured_is_refused() -> None:
    with pytest.raises(KernelError, match="2, 4, 8 GPUs, not for 3"):
        all_reduce(4096, 3, H100)
    with pytest.raises(KernelError, match="A10, which has no NVLink"):
        all_reduce(4096, 2, find("a10"))
