"""Sets of hidden units: which ones an FFN keeps, by the FFN's name, and how they are written in one short line.

As text a set is a list of ranges, "0-511,600", or where that is longer, as it is of units that lie scattered, "base64:"
and one bit for each unit up to the last, the first unit in the lowest bit of the first byte: a set of 14336 units takes
at most 2.4 kB, and needs no file of its own.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TypeAlias

Units: TypeAlias = tuple[int, ...]
"""Indices of hidden units: ascending, none twice."""

_BITS = "base64:"


def to_text(units: Units) -> str:
    """The shorter of the two texts of a set that is not empty."""
    ranges = ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in _runs(units))
    bits = bytearray(units[-1] // 8 + 1)
    for unit in units:
        bits[unit // 8] |= 1 << unit % 8
    return min(ranges, _BITS + base64.b64encode(bits).decode(), key=len)


def from_text(text: str) -> Units:
    """The set that :func:`to_text`, or a person, wrote.

    Raises:
        ValueError: it is no such text; the message says why.
    """
    if text.startswith(_BITS):
        try:
            bits = base64.b64decode(text.removeprefix(_BITS), validate=True)
        except binascii.Error as error:
            raise ValueError(f"{text[:40]!r} is no set of units in base64 ({error})") from error
        return tuple(8 * place + bit for place, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1)
    units: list[int] = []
    for part in filter(None, re.split(r"[,\s]+", text)):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"{part[:40]!r} is no unit and no range of units, such as 0-511")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= _MOST:
            raise ValueError(f"{part!r} is no range of units: {last} is not from {first} to {_MOST - 1}")
        units += range(first, last + 1)
    return units_of(units)


_MOST = 2**24
"""More units than any FFN has: a slip of the pen must not fill the memory."""


def units_of(given: Iterable[object]) -> Units:
    """A set of units from its members, in any order.

    Raises:
        ValueError: one is no whole number, is negative, or is there twice.
    """
    units: list[int] = []
    for unit in given:
        if not isinstance(unit, int) or isinstance(unit, bool) or not 0 <= unit < _MOST:
            raise ValueError(f"{unit!r} is no index of a hidden unit, which are whole numbers from 0 on")
        units.append(unit)
    units.sort()
    twice = next((one for one, other in pairwise(units) if one == other), None)
    if twice is not None:
        raise ValueError(f"unit {twice} is there twice")
    return tuple(units)


class Narrowed(Mapping[str, Units]):
    """Which units each of some FFNs keeps: an immutable mapping that can be hashed; its order means nothing.

    Args:
        given: of each FFN by name its units, as numbers in any order or as text.

    Raises:
        ValueError: a name is no name, or units are none; the message names the FFN.
    """

    __slots__ = ("_entries",)

    def __init__(self, given: Mapping[str, Iterable[object] | str] | None = None) -> None:
        self._entries = {name: _parsed(name, units) for name, units in (given or {}).items()}

    def __getitem__(self, name: str) -> Units:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return repr(self.as_text())

    def as_text(self) -> dict[str, str]:
        """The units of each FFN as text."""
        return {name: to_text(units) for name, units in self._entries.items()}


def _parsed(name: object, units: object) -> Units:
    if not isinstance(name, str):
        raise ValueError(f"narrow has the entry {name!r}, which is no name")
    if not isinstance(units, Iterable):
        raise ValueError(f"narrow[{name!r}] is {units!r}, not a list of hidden units, nor their text such as '0-511'")
    try:
        made = from_text(units) if isinstance(units, str) else units_of(units)
    except ValueError as error:
        raise ValueError(f"narrow[{name!r}]: {error}") from error
    if not made:
        raise ValueError(f"narrow[{name!r}] keeps no hidden unit: drop the FFN instead")
    return made


def _runs(units: Units) -> Iterator[tuple[int, int]]:
    """The first and the last unit of each run of units that follow each other."""
    first = last = units[0]
    for unit in units[1:]:
        if unit != last + 1:
            yield first, last
            first = unit
        last = unit
    yield first, last
