"""Where the planned model can be led back to the original: sums of its stream, and what the stream should be there.

After each residual sum the planned stream has let in some branches. The original's stream at the last of these, less
what the plan lets in only later, is what it should be: what was dropped on the way is in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from fxfuse.backend.frontend import Captured
from fxfuse.errors import CaptureError
from fxfuse.graph.constant import weight_only
from fxfuse.graph.values import parameters
from fxfuse.healing.maps import LinearMap, linear_maps
from fxfuse.plan import Plan
from fxfuse.stream.branch import Branch, Term
from fxfuse.stream.finder import ResidualStream, find_streams
from fxfuse.stream.sums import Sum


@dataclass(frozen=True)
class Target:
    """One residual sum of the planned model that the plan has changed.

    Attributes:
        sum: of the planned model.
        maps: the linear maps by which its branches write to the stream, or why they cannot be fitted, by branch.
        goal: node of the original's stream.
        absent: contributions in ``goal`` that the planned stream gets only later.
        clear: whether the goal can be told: what is absent was not scaled with the stream.
    """

    sum: Sum
    maps: Mapping[str, LinearMap | str]
    goal: fx.Node
    absent: tuple[Term, ...]
    clear: bool


@dataclass(frozen=True)
class Step:
    """One residual sum of the planned model, or a region that ends in one, and what its stream should be after it.

    Attributes:
        branches: names of those that are added there.
        maps: the linear maps by which they are, of those that can be fitted.
        refused: why others cannot, by branch.
        out: node of the planned stream after the sum.
        weights: the parameters that may change, by node: those of the maps, or all of a region.
        anew: names of those that are fitted from zero: what an output projection was made for says nothing of the
            linear map that takes an attention's place.
        goal: node of the original's stream.
        absent: contributions in ``goal`` that the planned stream gets only later.
    """

    branches: tuple[str, ...]
    maps: tuple[LinearMap, ...]
    refused: Mapping[str, str]
    out: fx.Node
    weights: Mapping[fx.Node, str]
    goal: fx.Node
    absent: tuple[Term, ...]
    anew: frozenset[str] = frozenset()


def find_targets(planned: Captured, originals: Sequence[ResidualStream], plan: Plan) -> tuple[Target, ...]:
    """The sums of the planned model from the first one that an edit reaches, in graph order.

    Args:
        planned: a graph under the plan; its branches are stamped with their names.
        originals: the streams of the same graph without it.
        plan: the plan.
    """
    gm, names = planned.gm, planned.names
    own = trainable(planned)
    constant = weight_only(gm, parameters(gm, names))
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    places = {b.name: (stream, n) for stream in originals for n, each in enumerate(stream.sums) for b in each.branches}
    before = {node: index for index, node in enumerate(originals[0].sums[0].out.graph.nodes)}
    first = min(before[stream.sums[n].out] for name, (stream, n) in places.items() if name in plan.names)
    targets: list[Target] = []
    for stream in find_streams(gm, names):
        inside: set[str] = set()
        for each in stream.sums:
            maps: dict[str, LinearMap | str] = {}
            for branch in each.branches:
                maps |= linear_maps(branch, own, constant)
            if lost := next((name for name in maps if name not in places), None):
                raise CaptureError(f"{lost!r} of the planned model is no branch of the original: it cannot be healed")
            inside |= maps.keys()
            if not inside:
                continue
            source = places[next(iter(inside))][0]
            last = source.sums[max(places[name][1] for name in inside)]
            if before[last.out] >= first:
                absent = _absent(source, last, inside, plan)
                clear = not absent or len(source.points) == len(source.sums) + 1  # no factors between the sums
                targets.append(Target(each, maps, last.out, absent, clear))
    return tuple(sorted(targets, key=lambda target: order[target.sum.out]))


def map_steps(planned: Captured, targets: Sequence[Target], plan: Plan) -> tuple[Step, ...]:
    """A step for each sum with maps that can be fitted."""
    steps: list[Step] = []
    for target in targets:
        # A map that takes an attention's place has no rows yet whose lengths a norm behind it could keep.
        found = [each for each in target.maps.values() if isinstance(each, LinearMap)]
        maps = tuple(each for each in found if each.norm is None or each.branch not in plan.linear)
        refused = {name: each for name, each in target.maps.items() if isinstance(each, str)}
        weights = {node: planned.names[node] for map_ in maps for node in map_.parameters}
        anew = frozenset(weights[node] for map_ in maps if map_.branch in plan.linear for node in map_.parameters)
        if maps and target.clear:
            names, out = tuple(target.maps), target.sum.out
            steps.append(Step(names, maps, refused, out, weights, target.goal, target.absent, anew))
    return tuple(steps)


def linear_steps(planned: Captured, targets: Sequence[Target], plan: Plan) -> tuple[Step, ...]:
    """A step for each attention that is made linear and whose map can be fitted, with that map alone."""
    steps: list[Step] = []
    for target in targets:
        own = {name: each for name, each in target.maps.items() if name in plan.linear}
        steps += map_steps(planned, [replace(target, maps={name: each}) for name, each in own.items()], plan)
    return tuple(steps)


def region_steps(planned: Captured, targets: Sequence[Target]) -> tuple[Step, ...]:
    """A step for each stretch of sums up to one with an FFN, with all parameters of its branches."""
    own = trainable(planned)
    uses = Counter(node for target in targets for branch in target.sum.branches for node in set(branch.parameters))
    steps: list[Step] = []
    names: list[str] = []
    weights: dict[fx.Node, str] = {}
    for target in targets:
        names += target.maps
        held = [node for branch in target.sum.branches for node in branch.parameters]
        weights |= {node: planned.names[node] for node in held if node in own and uses[node] == 1}
        ends = target is targets[-1] or any(branch.kind in ("gated_ffn", "ffn") for branch in target.sum.branches)
        if ends and weights and target.clear:
            steps.append(Step(tuple(names), (), {}, target.sum.out, weights, target.goal, target.absent))
            names, weights = [], {}
    return tuple(steps)


def trainable(planned: Captured) -> dict[fx.Node, str]:
    """The placeholders of floating-point parameters, and their names."""
    pairs = zip(planned.gm.graph.find_nodes(op="placeholder"), planned.inputs, strict=True)
    given = {node for node, value in pairs if isinstance(value, nn.Parameter) and value.is_floating_point()}
    return {node: name for node, name in planned.names.items() if node in given}


def _absent(source: ResidualStream, last: Sum, inside: set[str], plan: Plan) -> tuple[Term, ...]:
    """What the original has added until ``last`` that is neither ``inside`` the planned stream nor dropped."""
    branches: list[Branch] = []
    for each in source.sums:
        branches += [branch for branch in each.branches if branch.name not in inside and branch.name not in plan.drop]
        if each is last:
            break
    return tuple(term for branch in branches for term in branch.terms)
