"""A planned stream as data: the points at which branches are added, in order, and who is added at which."""

from __future__ import annotations

from collections.abc import Sequence

from fxfuse.errors import ExportError
from fxfuse.plan import Member, Plan, flat


def planned_points(sums: Sequence[Sequence[str]], plan: Plan) -> list[tuple[Member, ...]]:
    """Who is added at each residual sum once the plan is applied; a sum that is left without any is none.

    Args:
        sums: the names of the branches that each sum of the original adds, in stream order.
        plan: a plan that fits them.

    Returns:
        The members of each sum, each a branch or a private sequence. All of a sum read the stream as it is before it.
    """
    order = {name: place for place, name in enumerate(name for names in sums for name in names)}
    group_of = {name: group for group in plan.parallel for name in flat(group)}
    host = {group: min(flat(group), key=lambda name: order.get(name, len(order))) for group in plan.parallel}
    absent = next((name for name in group_of if name not in order), None)
    if absent is not None:
        raise ExportError(f"{absent!r} is in a group of the plan and no branch of this model: was it dropped before?")
    points: list[tuple[Member, ...]] = []
    for names in sums:
        members: list[Member] = []
        for name in names:
            if name in plan.drop:
                continue
            group = group_of.get(name)
            if group is None:
                members.append(name)
            elif host[group] == name:
                members.extend(group)
        if members:
            points.append(tuple(members))
    return points
