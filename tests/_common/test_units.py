from __future__ import annotations

import base64
import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse._common.units import Narrowed, from_text, to_text

SETS = st.sets(st.integers(0, 3000), min_size=1).map(lambda units: tuple(sorted(units)))


@given(SETS)
def test_a_set_that_is_written_is_read_again(units: tuple[int, ...]) -> None:
    assert from_text(to_text(units)) == units


def test_ranges_are_written_where_that_is_shorter() -> None:
    assert to_text((*range(512), 600)) == "0-511,600"
    scattered = tuple(range(0, 14336, 2))
    assert to_text(scattered).startswith("base64:")
    assert len(to_text(scattered)) < 2400


def test_the_first_unit_is_the_lowest_bit_of_the_first_byte() -> None:
    assert from_text("base64:" + base64.b64encode(bytes([0b101, 0b10])).decode()) == (0, 2, 9)


def test_people_write_ranges_in_any_order_and_with_spaces() -> None:
    assert from_text("600, 0-3") == (0, 1, 2, 3, 600)


@pytest.mark.parametrize("text", ["0-3,3", "5-2", "a", "1-", "-1", "1.5", "base64:!!", "0-99999999999"])
def test_what_is_no_set_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="unit"):
        from_text(text)


def test_a_mapping_of_sets_is_a_value() -> None:
    one, other = Narrowed({"a": [2, 0], "b": "1-3"}), Narrowed({"b": (1, 2, 3), "a": (0, 2)})

    assert one == other and hash(one) == hash(other)
    assert one != Narrowed({"a": (0, 2)})
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    with pytest.raises(TypeError):
        one["a"] = (1,)  # type: ignore[index]  # that is what is tested
