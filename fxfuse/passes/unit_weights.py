"""Unit weights: which parts of which parameters the hidden units of an FFN are, for those who make these smaller."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from fxfuse._common.units import Units
from fxfuse.errors import PlanError
from fxfuse.ffn.anatomy import FFN, Projection
from fxfuse.graph.surgery import transaction
from fxfuse.graph.values import parameters, product, shape
from fxfuse.passes.narrow import narrowable
from fxfuse.passes.normalise.normal import normalise
from fxfuse.passes.select import branch_names
from fxfuse.stream.finder import find_streams


@dataclass(frozen=True)
class Part:
    """What a parameter keeps: these ``indices`` of its dimension ``dim``; ``name`` is its dotted name."""

    name: str
    dim: int
    indices: Units


def unit_weights(gm: fx.GraphModule, units: Mapping[str, Units]) -> tuple[dict[str, tuple[Part, ...]], tuple[str, ...]]:
    """Of each FFN named that the graph holds, what its parameters keep; and the names of all branches of the graph.

    An FFN that has no other units keeps all of its parameters.

    Raises:
        PlanError: one is no FFN that can be narrowed, or its weights are no parameters but computed from some.
    """
    made: dict[str, tuple[Part, ...]] = {}
    with transaction(gm):
        normalise(gm)
        streams = find_streams(gm)
        weights = parameters(gm)
        for stream in streams:
            for branch in stream.branches:
                if branch.name in units:
                    own = units[branch.name]
                    ffn = narrowable(branch, own)
                    made[branch.name] = tuple(_parts(branch.name, ffn, own, weights))
    return made, branch_names(streams)


def _parts(name: str, ffn: FFN, units: Units, weights: Mapping[fx.Node, str]) -> Iterator[Part]:
    if len(units) == ffn.projections[0].width:
        return
    kept: dict[tuple[fx.Node, int], set[int]] = defaultdict(set)
    left: dict[tuple[fx.Node, int], set[int]] = defaultdict(set)
    chosen = set(units)
    for node, dim, places in _places(ffn):
        for unit, place in enumerate(places):
            (kept if unit in chosen else left)[node, dim].add(place)
    for (node, dim), gone in left.items():
        path = weights.get(node, "")
        if not path:
            raise PlanError(
                f"the units of {name!r} cannot leave its weights: {node.name} is no parameter, but computed from "
                "others (quantized, or an adapter). torch.compile with this plan narrows it in the graph"
            )
        sizes = shape(node) or ()
        count = sizes[dim]
        assert isinstance(count, int)
        stay = kept[node, dim]
        yield Part(path, dim, tuple(index for index in range(count) if index in stay or index not in gone))


def _places(ffn: FFN) -> Iterator[tuple[fx.Node, int, Iterable[int]]]:
    """Of each weight that has something for each unit: the dimension, and where in it the units lie, in order."""
    for projection in ffn.projections:
        rows = _rows(projection)
        yield projection.weight, int(projection.transposed), rows
        if projection.bias is not None:
            yield projection.bias, 0, rows
    yield ffn.down.weight, int(not ffn.down.transposed), range(ffn.down.fan_in)
    for constant in ffn.constants:
        sizes = shape(constant) or ()
        if product(sizes) != 1:
            yield constant, len(sizes) - 1, range(ffn.down.fan_in)


def _rows(projection: Projection) -> range:
    rows = projection.rows
    return range(projection.width) if rows is None else range(rows.start, rows.stop, rows.step)
