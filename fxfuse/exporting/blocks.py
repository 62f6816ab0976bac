"""The planned stream as layers: which points a layer computes, and in the place of which of its branches.

There is a layer for each attention, as engines that serve models of transformers want it: a point with an attention
begins one, in the layer that the attention has in the original, and the FFNs until the next go on in it. After a point
with several attentions come layers that do nothing, so that the number of a layer is that of its attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fxfuse.errors import ExportError
from fxfuse.exporting.calls import Site
from fxfuse.exporting.units import Unit
from fxfuse.plan import Member, Plan

Points = list[tuple[Member, ...]]


@dataclass
class PlannedLayer:
    """A layer of the planned model.

    Attributes:
        host: path of the original's layer that it is made of.
        attentions: paths of the units whose caches are its own, in order.
        points: what is computed in the place of a unit of the layer, by its path; the others compute nothing.
        changed: whether it is not just the original's.
    """

    host: str
    attentions: tuple[str, ...]
    points: dict[str, Points] = field(default_factory=dict)
    changed: bool = True


def planned_layers(
    points: Points, sums: Sequence[Sequence[Unit]], sites: Mapping[str, Site], plan: Plan
) -> list[PlannedLayer]:
    """Distribute the points over layers.

    Args:
        points: of the planned stream.
        sums: units of the original's.
        sites: how units are called.
        plan: of which linear maps have no cache, and narrowed FFNs change the layer that they are in.

    Raises:
        ExportError: no attention is left, or two points need the same layer.
    """
    units = {unit.path: unit for each in sums for unit in each}
    layers: list[PlannedLayer] = []
    early: Points = []
    rest: list[Points] = []
    for point in points:
        caching = tuple(path for path in _flat(point) if sites[path].caches and path not in plan.linear)
        if not caching:
            (rest[-1] if rest else early).append(point)
            continue
        layers.append(PlannedLayer(units[caching[0]].layer, caching))
        rest.append([point])
    if not layers:
        raise ExportError("the plan leaves no attention, and transformers' models count tokens in the cache of one")
    rest[0][:0] = early
    hosts = [layer.host for layer in layers]
    double = next((host for host in hosts if hosts.count(host) > 1), None)
    if double is not None:
        raise ExportError(f"{double!r} has two attentions at different points of the planned stream")
    for layer, own in zip(layers, rest, strict=True):
        _place(layer, own, sums)
        layer.changed |= any(path in plan.narrow for point in own for path in _flat(point))
    return layers


def _place(layer: PlannedLayer, points: Points, sums: Sequence[Sequence[Unit]]) -> None:
    """Give the points of a layer to the branches that it has in the original."""
    original = [[unit.path for unit in each if unit.layer == layer.host] for each in sums]
    original = [each for each in original if each]
    slots = [path for each in original for path in each]
    layer.changed = points != [tuple(each) for each in original]
    place = next(index for index, each in enumerate(original) if layer.attentions[0] in each)
    begins = next(index for index, point in enumerate(points) if layer.attentions[0] in _flat(point))
    layer.points = {path: [] for path in slots}
    later = original[place + 1][0] if place + 1 < len(original) else None
    if later is None:
        layer.points[layer.attentions[0]] = points
    else:
        layer.points[layer.attentions[0]] = points[: begins + 1]
        layer.points[later] = points[begins + 1 :]


def _flat(point: Sequence[Member]) -> tuple[str, ...]:
    return tuple(name for member in point for name in ((member,) if isinstance(member, str) else member))
