from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.measure.statistics import Tally

numbers = st.lists(st.floats(2**-23, 100.0, width=32), min_size=1, max_size=200)


@given(batches=st.lists(numbers, min_size=1, max_size=4))
def test_mean_maximum_and_percentile_are_those_of_all_numbers(batches: list[list[float]]) -> None:
    tally = Tally(2)
    for batch in batches:
        tally.add(1, torch.tensor(batch))
    everything = torch.tensor([number for batch in batches for number in batch])

    assert torch.isclose(tally.mean()[1], everything.double().mean())
    assert tally.largest[1] == everything.max().double()
    exact = torch.quantile(everything, 0.99, interpolation="higher").double()
    assert (tally.quantile(0.99)[1] / exact - 1).abs() < 0.031
    assert tally.mean()[0] == tally.quantile(0.99)[0] == 0


def test_zeros_are_zeros() -> None:
    tally = Tally(1)
    tally.add(0, torch.zeros(100))

    assert (tally.mean(), tally.quantile(0.99), tally.largest) == (0, 0, 0)


def test_a_restored_tally_goes_on_where_it_was() -> None:
    one, other = Tally(1), Tally(1)
    for part in (torch.rand(50), torch.rand(30)):
        one.add(0, part)
        state = {name: tensor.clone() for name, tensor in other.state().items()}
        other = Tally.of(state)
        other.add(0, part)

    assert torch.equal(one.histogram, other.histogram)
    assert torch.equal(one.mean(), other.mean())
