"""Linear maps behind a norm: what an attention that becomes one adds to the stream may pass a norm of the output first.

No ridge regression leads the stream itself back then. But what the attention's projection gave in the original, before
that norm, is known, and the map is fitted to that.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch import fx

from fxfuse.backend.frontend import Captured
from fxfuse.ffn.projection import projection
from fxfuse.graph.constant import weight_only
from fxfuse.graph.values import parameters
from fxfuse.healing.maps import LinearMap, linear_map, linear_maps
from fxfuse.healing.targets import Step, trainable
from fxfuse.plan import Plan
from fxfuse.stream.branch import Branch, Term
from fxfuse.stream.ends import last_products
from fxfuse.stream.finder import ResidualStream, find_streams


def steps_behind_norms(
    planned: Captured, original: Captured, streams: Sequence[ResidualStream], plan: Plan
) -> list[Step]:
    """A step for each attention made linear whose map does not write to the stream itself; its ``out`` is the map's.

    Args:
        planned: a graph under the plan; its branches are stamped with their names.
        original: the graph without it, in canonical form.
        streams: of the original.
        plan: the plan.
    """
    weights = trainable(planned)
    constant = weight_only(planned.gm, parameters(planned.gm, planned.names))
    before = weight_only(original.gm, parameters(original.gm, original.names))
    originals = {branch.name: branch for stream in streams for branch in stream.branches}
    steps: list[Step] = []
    for stream in find_streams(planned.gm, planned.names):
        for branch in stream.branches:
            (name, direct), *others = linear_maps(branch, weights, constant).items()
            straight = isinstance(direct, LinearMap) and direct.norm is None
            if others or name not in plan.linear or straight:
                continue
            out, goal = _product(branch, constant), _product(originals[name], before)
            map_ = None if out is None else linear_map(name, Term(out), weights, constant)
            if out is not None and goal is not None and isinstance(map_, LinearMap):
                held = {node: weights[node] for node in map_.parameters}
                steps.append(Step((name,), (map_,), {}, out, held, goal, (), frozenset(held.values())))
    return steps


def _product(branch: Branch, constant: Container[fx.Node]) -> fx.Node | None:
    """The projection that a branch ends in, its bias included, if it ends in one."""
    last = last_products(branch.terms[0].node, branch.nodes) if len(branch.terms) == 1 else []
    if len(last) != 1:
        return None
    (product,) = last
    users = list(product.users)
    biased = projection(users[0], constant) if len(users) == 1 else None
    return users[0] if biased is not None and biased.bias is not None else product
