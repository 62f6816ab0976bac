"""What JSON says becomes dataclasses, or an error that says where it is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import ClassVar

import pytest
from pydantic import ConfigDict

from fxfuse._common.typed import typed


@dataclass(frozen=True)
class Point:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    at: tuple[float, ...]
    count: int = 1


def test_it_is_what_was_written() -> None:
    points = (Point("a", (1.5, float("inf")), 2), Point("b", ()))

    assert typed(tuple[Point, ...], json.loads(json.dumps([asdict(each) for each in points]))) == points


def test_whole_numbers_may_stand_for_others_and_a_default_for_what_is_not_there() -> None:
    assert typed(Point, {"name": "a", "at": [1]}) == Point("a", (1.0,))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"name": 1, "at": []}, r"point\.name: Input should be a valid string, got '1'"),
        ({"name": "a", "at": ["1"]}, r"point\.at\[0\]: Input should be a valid number"),
        ({"name": "a", "at": [], "count": 1.5}, r"point\.count"),
        ({"name": "a", "at": [], "count": True}, r"point\.count"),
        ({"name": "a"}, r"point\.at: (Missing|Field required)"),
        ({"name": "a", "at": [], "more": 1}, r"point\.more: Unexpected"),
        ([], "point: Input should be an object"),
    ],
)
def test_anything_else_is_an_error_that_says_where(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        typed(Point, value, "point")
