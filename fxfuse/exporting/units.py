"""Units: the modules that a planned stream consists of, where several branches of a graph may be one module's.

The routed experts and the shared one of a mixture are two branches of one sum, and one module is called for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxfuse.errors import ExportError
from fxfuse.exporting.points import planned_points
from fxfuse.exporting.stream import Planned
from fxfuse.plan import Group, Member, Plan
from fxfuse.stream.branch import Branch


@dataclass(frozen=True)
class Unit:
    """A module that is called once for one or several branches of a sum.

    Attributes:
        path: of the module, in the model.
        layer: path of the layer that it belongs to, an entry of a list of modules.
        branches: those that it computes.
    """

    path: str
    layer: str
    branches: tuple[Branch, ...]


def units_of(planned: Planned, layers: str) -> list[tuple[Unit, ...]]:
    """The units of each sum of the original stream.

    Args:
        planned: the stream.
        layers: the path of the list of layers.

    Raises:
        ExportError: a branch has no module, or none in a layer.
    """
    sums: list[tuple[Unit, ...]] = []
    for each in planned.stream.sums:
        held: dict[tuple[str, str], list[Branch]] = {}
        for branch in each.branches:
            if not branch.name.startswith(f"{layers}."):
                raise ExportError(f"{branch.name!r} is no module of one of {layers}, so no checkpoint can be edited so")
            number, _, rest = branch.name.removeprefix(f"{layers}.").partition(".")
            held.setdefault((f"{layers}.{number}", rest.split(".")[0]), []).append(branch)
        sums.append(tuple(_unit(layer, first, own) for (layer, first), own in held.items()))
    return sums


def _unit(layer: str, first: str, branches: Sequence[Branch]) -> Unit:
    path = branches[0].name if len(branches) == 1 else f"{layer}.{first}"
    return Unit(path, layer, tuple(branches))


def points_of(sums: Sequence[Sequence[Unit]], plan: Plan) -> list[tuple[Member, ...]]:
    """The planned points, by the paths of units.

    Raises:
        ExportError: the plan edits one branch of a module, and another not.
    """
    known = {unit.path: unit for units in sums for unit in units}
    drop = set(plan.drop)
    groups = list(plan.parallel)
    for unit in known.values():
        names = [branch.name for branch in unit.branches]
        if len(names) == 1 or not set(names) & set(plan.names):
            continue
        if drop.issuperset(names):
            drop.add(unit.path)
            continue
        index = next((index for index, group in enumerate(groups) if set(names) <= set(group)), None)
        if index is None:
            raise ExportError(
                f"{', '.join(names)} are computed by one module, {unit.path!r}, and the plan does different things "
                "to them: a checkpoint of modules cannot say that"
            )
        groups[index] = _with(groups[index], names, unit.path)
    mapped = Plan(drop=tuple(drop), parallel=tuple(groups))
    return planned_points([[unit.path for unit in units] for units in sums], mapped)


def _with(group: Group, names: Sequence[str], path: str) -> Group:
    kept = [member for member in group if member not in names]
    place = next(index for index, member in enumerate(group) if member in names)
    return (*kept[:place], path, *kept[place:])
