from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxfuse.packing.fingerprint import ALONG, AT_ONCE, TOGETHER, WHOLE, Fingerprint, Watch, watches

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool,
    torch.complex64, torch.complex128,
]  # fmt: skip


def values(*sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randint(1, 100, sizes, generator=torch.Generator().manual_seed(0))
    return drawn.to(torch.float32).to(dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1),
    "rows of a larger one": lambda tensor: tensor[3:-2],
    "columns of a larger one": lambda tensor: tensor[..., 3:-2],
    "every other column": lambda tensor: tensor[..., ::2],
    "every other row": lambda tensor: tensor[::2],
}
SIZES = {"small": (12, 20), "large": (150, 290), "long": (30000, 8), "large, of three dimensions": (16, 70, 90)}


def watched(tensor: Tensor) -> Watch:
    """A watch of ``tensor`` among others, too many to be looked at together."""
    (watch,) = watches([Fingerprint(values(5)), Fingerprint(tensor), Fingerprint(values(500, 300))])
    return watch


def calls(watch: Watch, most: int = 400) -> int:
    """The number of calls until an edit is noticed."""
    return next(call for call in range(1, most) if not watch.same())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
class TestLayouts:
    def test_what_stays_is_the_same_at_every_call(self, size: str, layout: str) -> None:
        watch = watched(LAYOUTS[layout](values(*SIZES[size])))

        assert all(watch.same() for _ in range(300))

    def test_a_change_of_all_values_is_noticed_at_once_in_every_phase(self, size: str, layout: str) -> None:
        tensor = LAYOUTS[layout](values(*SIZES[size]))
        watch = watched(tensor)
        for _ in range(20):
            before = tensor.clone()
            tensor += 1
            assert not watch.same()
            tensor.copy_(before)
            assert watch.same()

    def test_a_row_and_a_column_are_noticed_within_a_round(self, size: str, layout: str) -> None:
        tensor = LAYOUTS[layout](values(*SIZES[size]))
        watch = watched(tensor)
        for dim in (0, tensor.dim() - 1):
            for place in (0, 1, tensor.shape[dim] // 3, tensor.shape[dim] - 1):
                line = tensor.select(dim, place)
                before = line.clone()
                line.zero_()
                assert calls(watch) <= watch.round
                line.copy_(before)
                assert all(watch.same() for _ in range(2 * watch.round))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(), (3,), (7, 5), (300, 200)])
def test_every_dtype(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = values(*sizes, dtype=dtype)
    watch = watched(tensor)
    assert all(watch.same() for _ in range(100))
    tensor.copy_(torch.zeros(sizes).to(dtype))

    assert not watch.same()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_one_value_of_a_small_tensor_is_noticed_at_once(layout: str) -> None:
    tensor = LAYOUTS[layout](values(9, 8))
    watch = watched(tensor)
    for row in tensor:
        for index in range(len(row)):
            row[index] += 1
            assert not watch.same()
            row[index] -= 1
            assert watch.same()


def test_not_a_number_equals_itself_and_minus_zero_is_not_zero() -> None:
    tensor = torch.tensor([float("nan"), 0.0])
    watch = watched(tensor)
    assert watch.same()
    tensor[1] = -0.0

    assert not watch.same()


def test_what_was_taken_since_is_what_is_right() -> None:
    tensor, large = values(5), values(500, 300)
    fingerprints = [Fingerprint(tensor), Fingerprint(large)]
    watch = Watch(fingerprints)
    tensor += 1
    large[7] = 0
    assert not all(each.same() for each in fingerprints)
    for each in fingerprints:
        each.take()
    watch.take()

    assert all(each.same() for each in fingerprints)
    assert all(watch.same() for _ in range(400))


def test_tensors_that_hold_nothing_or_one_value_many_times() -> None:
    spread = values(1, 4).expand(3000, 4)
    watch = Watch([Fingerprint(values(0, 3)), Fingerprint(spread)])
    assert all(watch.same() for _ in range(100))
    spread[0, 2] = 0

    assert not watch.same()


def test_what_a_call_looks_at_is_bounded() -> None:
    large = [Fingerprint(torch.zeros(300, 500)) for _ in range(100)]
    watch = Watch(large)

    assert max(len(look._seen) for turn in watch._turns for look in turn) <= 2 * ALONG
    assert max(len(look._seen) for phase in watch._phases for look in phase) <= 100 * (64 // 8 + 1)
    assert not watch._whole
    assert WHOLE < 300 * 500 * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_tensors_that_are_small_together_any_value_is_noticed_at_once(layout: str) -> None:
    tensors = [LAYOUTS[layout](values(150, 290)), values(7), values(99, 300)]
    (watch,) = watches(map(Fingerprint, tensors))
    assert sum(each.nbytes for each in watch.fingerprints) <= TOGETHER
    for tensor in tensors:
        for place in (0, tensor.shape[-1] // 2, tensor.shape[-1] - 1):
            tensor[..., place].view(-1)[:1] += 1
            assert not watch.same()
            tensor[..., place].view(-1)[:1] -= 1
            assert watch.same()
    assert watch.round == 1


def test_of_many_small_tensors_the_smallest_are_looked_at_whole_and_of_the_others_a_piece() -> None:
    small, others = torch.zeros(8), [torch.zeros(4000) for _ in range(80)]
    watch = Watch([Fingerprint(each) for each in (*others, small)])
    assert sum(8 * len(look._seen) for look in watch._whole) <= AT_ONCE
    small[3] = 1
    assert not watch.same()
    small[3] = 0

    for each in others:
        each[17] = 1
        assert calls(watch) <= watch.round
        each[17] = 0


def test_neighbours_in_the_same_memory_are_none_of_its_own() -> None:
    """Words are read whole, and what the allocator has beside a tensor is not looked at."""
    tensors = [torch.zeros(odd, dtype=torch.int8) for odd in (1, 7, 8, 9, 15, 1001)]
    watch = Watch([Fingerprint(each) for each in tensors])
    for _ in range(50):
        torch.randn(997).sum()
        assert watch.same()
