"""Recordings written by hand: what was recorded, in a few letters and numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxfuse import Plan
from fxfuse.measure.recording import BranchRecord, GroupRecord, Recording
from fxfuse.stream.branch import Kind

KINDS: dict[str, Kind] = {"a": "attention", "f": "gated_ffn", "p": "ffn", "m": "moe", "o": "other", "x": "gated_ffn"}
"""``x`` is an FFN that cannot become a part of a wide one."""

Pairs = Mapping[tuple[str, str], float]


def recording(
    layout: str,
    *,
    mean: Pairs | Tensor = {},  # noqa: B006 - it is only read
    worst: Pairs | Tensor = {},  # noqa: B006
    kl: Mapping[str, float] | float = 0.0,
    widths: Mapping[str, int] = {},
    groups: Mapping[tuple[str, ...], float] = {},
    plan: Plan | None = None,
) -> Recording:
    """A recording of branches a0, f0, a1, ...: a letter of ``KINDS`` and how many of it there were before.

    Args:
        layout: one letter a branch; "(af)" are added in one sum, "|" starts another stream.
        mean, worst: distances by (dropped, measured); 0 where not given.
        kl: per branch, or of all.
        widths: of FFNs; 10 where not given.
        groups: recorded KL by group.
        plan: what the recorded model follows.
    """
    branches = tuple(_branches(layout, widths))
    names = [branch.name for branch in branches]
    m = len(names)

    def matrix(given: Pairs | Tensor) -> Tensor:
        if isinstance(given, Tensor):
            return given
        made = torch.zeros(m, m)
        for (row, column), value in given.items():
            made[names.index(row), names.index(column)] = value
        return made

    kls = [kl.get(name, 0.0) if isinstance(kl, Mapping) else kl for name in names]
    return Recording(
        branches=branches,
        mean=matrix(mean),
        p99=matrix(worst),
        max=matrix(worst),
        cosine=1 - torch.tensor(kls) / 10,  # in the same order
        norm_ratio=torch.arange(m).flip(0).float(),  # in the opposite order
        kl=torch.tensor(kls),
        groups=tuple(GroupRecord(group, math.nan, math.nan, math.nan, cost) for group, cost in groups.items()),
        tokens=100,
        plan=plan or Plan(),
    )


def _branches(layout: str, widths: Mapping[str, int]) -> list[BranchRecord]:
    found: list[BranchRecord] = []
    seen: Counter[str] = Counter()
    for stream, part in enumerate(layout.split("|")):
        level, together = 0, False
        for letter in part:
            if letter in "()":
                level += together
                together = letter == "("
                continue
            name = f"{letter}{seen[letter]}"
            seen[letter] += 1
            width = widths.get(name, 10) if letter in "fp" else 0
            found.append(BranchRecord(name, KINDS[letter], stream, level, level, 1000, width, "" if width else "so"))
            level += not together
    return found


LAYOUTS = st.lists(
    st.lists(st.sampled_from(["f", "f", "f", "p", "a", "a", "x", "m", "(af)"]), max_size=7).map("".join),
    min_size=1,
    max_size=2,
).map("|".join)
"""Up to 14 sums in one or two streams, most of them FFNs."""


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    """Any layout, with distances of 0..1, scores of 0..1 and widths of 1..20."""
    layout = draw(LAYOUTS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    names = [branch.name for branch in recording(layout).branches]
    m = len(names)
    mean, worst = (torch.rand(m, m, generator=generator).triu(1) for _ in range(2))
    widths = dict(zip(names, torch.randint(1, 21, (m,), generator=generator).tolist(), strict=True))
    kl = dict(zip(names, torch.rand(m, generator=generator).tolist(), strict=True))
    return recording(layout, mean=mean, worst=worst, kl=kl, widths=widths)


def names_of(made: Recording, letters: str) -> list[str]:
    """The branches of these letters, in stream order."""
    return [branch.name for branch in made.branches if branch.name[0] in letters]
