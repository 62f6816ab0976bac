"""The models of FFN Fusion (arXiv 2503.18908), and their layouts as they were released.

Sources: the configuration files of Llama-3.1-405B, Llama-3.3-70B, Llama-3_3-Nemotron-Super-49B-v1 and
Llama-3_1-Nemotron-Ultra-253B-v1, whose blocks without attention and FFN are left out; the runs of FFNs that were fused
from the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from fxfuse.errors import LoadError, nearest
from fxfuse.hardware.layout import Layout, Part, Shape

HEAD = 128
"""Numbers in a head, of all four."""

CACHED_HEADS = 8
"""Heads of keys and values in each attention, of all four."""

VOCABULARY = 128_256

Run: TypeAlias = tuple[int, bool, int]
"""So many blocks, with attention or without, their FFNs of so many hidden units."""

_70B: tuple[Run, ...] = ((80, True, 28672),)
_405B: tuple[Run, ...] = ((126, True, 53248),)
_49B: tuple[Run, ...] = (
    (1, True, 14336), (5, True, 28672), (2, False, 14336), (3, True, 28672), (1, False, 17920), (30, True, 28672),
    (1, False, 7168), (2, False, 14336), (1, False, 7168), (1, False, 28672), (1, False, 7168), (1, False, 14336),
    (3, False, 7168), (1, True, 28672), (1, False, 7168), (2, False, 5632), (1, False, 7168), (3, False, 5632),
    (2, False, 7168), (2, False, 2816), (2, False, 5632), (2, False, 2816), (1, False, 5632), (2, False, 2816),
    (9, True, 28672),
)  # fmt: skip
_253B_HEAD: tuple[Run, ...] = (
    (1, True, 5376), (1, True, 10752), (6, True, 16128), (1, True, 21504), (3, True, 21504), (2, True, 53248),
    (3, True, 53248), (3, True, 53248), (1, True, 26624), (3, True, 21504), (1, False, 21504), (1, True, 53248),
    (1, False, 53248), (4, True, 53248), (4, True, 53248), (4, True, 53248), (4, True, 53248), (1, True, 53248),
    (3, True, 37376), (1, True, 32000), (3, True, 26624), (2, False, 26624), (1, True, 26624), (7, False, 26624),
    (1, True, 26624), (1, True, 32000), (1, True, 53248), (1, False, 53248), (1, True, 53248),
)  # fmt: skip
_253B_TAIL: tuple[Run, ...] = (
    (1, False, 21504), (1, True, 21504), (1, True, 26624), (2, True, 26624), (1, True, 37376), (4, True, 53248),
    (1, True, 26624),
)  # fmt: skip

FUSED: tuple[tuple[int, int], ...] = ((8, 399_360), (12, 425_984), (15, 343_040), (14, 301_056))
"""Of the 253B: so many FFNs, as released one of so many hidden units. How many each had is not told: taken as equal."""

UNIT = 128
"""Hidden units by which a width is divided into those of the FFNs that it came from."""


def _layout(name: str, d: int, heads: int, runs: Sequence[Run]) -> Layout:
    blocks = [(attention, width) for count, attention, width in runs for _ in range(count)]
    parts = [
        part for block, (attention, width) in enumerate(blocks) for part in _block(block, d, heads, attention, width)
    ]
    return Layout(name, d, VOCABULARY, tuple(parts))


def _block(block: int, d: int, heads: int, attention: bool, width: int) -> Iterator[Part]:
    if attention:
        weights = 2 * d * HEAD * (heads + CACHED_HEADS)
        cache = 2 * HEAD * CACHED_HEADS
        yield Part((Shape(f"model.layers.{block}.self_attn", "attention", weights, cache=cache, heads=CACHED_HEADS),))
    yield Part((Shape(f"model.layers.{block}.mlp", "ffn", 3 * d * width, width, joins=True),))


def _divided(total: int, count: int) -> list[int]:
    """A width in ``count`` parts that are as equal as multiples of `UNIT` can be."""
    least, more = divmod(total // UNIT, count)
    return [UNIT * (least + (place < more)) for place in range(count)]


def _layouts() -> Mapping[str, Layout]:
    wide: list[Run] = [(1, False, width) for _, width in FUSED]
    before = [(1, False, width) for count, total in FUSED for width in _divided(total, count)]
    return {
        "llama-70b": _layout("llama-70b", 8192, 64, _70B),
        "llama-405b": _layout("llama-405b", 16384, 128, _405B),
        "nemotron-49b": _layout("nemotron-49b", 8192, 64, _49B),
        "nemotron-253b": _layout("nemotron-253b", 16384, 128, (*_253B_HEAD, *wide, *_253B_TAIL)),
        "nemotron-253b-unfused": _layout("nemotron-253b-unfused", 16384, 128, (*_253B_HEAD, *before, *_253B_TAIL)),
    }


def find(name: str) -> Layout:
    """The layout of one of the paper's models.

    Raises:
        LoadError: there is none of this name; the message lists those there are.
    """
    known = _layouts()
    if name not in known:
        raise LoadError(f"there is no layout {name!r}{nearest(name, known)}")
    return known[name]


NAMES = tuple(_layouts())
"""Of the layouts."""


def fused_groups() -> list[list[str]]:
    """The FFNs of nemotron-253b-unfused that the release fused: ``Plan.parallel`` makes nemotron-253b of it."""
    before = sum(count for count, *_ in _253B_HEAD)
    groups = []
    for count, _ in FUSED:
        groups.append([f"model.layers.{block}.mlp" for block in range(before, before + count)])
        before += count
    return groups
