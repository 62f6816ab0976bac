"""Costs written by hand: of attentions a second, of FFNs two, of two in a group half a second less; 90 bytes a unit."""

from __future__ import annotations

from collections.abc import Collection

from fxfuse.bench.branches import BranchTime
from fxfuse.measure.recording import Recording
from fxfuse.planning.costs import Costs


def costs_of(made: Recording, no_map: Collection[str] = (), reduction: float = 0.0) -> Costs:
    """An attention keeps 64 bytes of cache, and could be a linear map of a quarter of a second and of 300 bytes."""

    def one(name: str, kind: str, width: int, parameters: int) -> BranchTime:
        if kind == "attention":
            linear = None if name in no_map else 0.25
            return BranchTime(name, 1.0, linear, (), parameters, 300, 64, reduction=reduction)
        groups = (2.0, 3.5, 4.75) if width else ()
        return BranchTime(name, 2.0, None, groups, parameters, 0, 0, width, 90 if width else 0, reduction)

    branches = tuple(one(b.name, b.kind, b.width, b.parameters) for b in made.branches)
    whole = sum(branch.seconds for branch in branches) + 1.0
    memory = sum(branch.parameters for branch in branches) + 500
    return Costs(whole, memory, branches, "decode", 1, 16, "nowhere")
