"""Carry: what is known of the streams of a graph, carried over a rewrite that takes branches out.

A drop leaves alone what the other branches compute, so that they need not be found anew: only points of the stream have
other nodes now. A rewrite that moves or cuts branches changes what they are, and after it they are recognised anew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

from torch import fx

from fxfuse.stream.branch import Branch
from fxfuse.stream.finder import ResidualStream
from fxfuse.stream.sums import Sum

T = TypeVar("T")


def carried(
    streams: Sequence[ResidualStream],
    graph: fx.Graph,
    dropped: Collection[Branch],
    replaced: Mapping[fx.Node, fx.Node],
) -> tuple[ResidualStream, ...] | None:
    """The streams of ``graph`` after ``dropped`` have left it; None where they have to be found anew.

    That is where a sum without its branches left something else than the stream that it took, such as a cast or a sum
    of values that do not depend on it, or where several streams feed each other.

    Args:
        streams: what was found before.
        graph: the graph as it is now.
        dropped: the branches that are gone.
        replaced: what stands now for the outs of the sums that lost a branch.
    """
    if any(branch.crossing for stream in streams for branch in stream.branches):
        return None
    alive = dict.fromkeys(graph.nodes)
    made = [_without(stream, alive, dropped, replaced) for stream in streams]
    left = tuple(stream for stream in made if stream is not None)
    return left if len(left) == len(made) else None


def _without(
    stream: ResidualStream,
    alive: Collection[fx.Node],
    dropped: Collection[Branch],
    replaced: Mapping[fx.Node, fx.Node],
) -> ResidualStream | None:
    """One stream without the branches that are gone, if no more than they have changed."""
    sums: list[Sum] = []
    for residual in stream.sums:
        branches = tuple(branch for branch in residual.branches if branch not in dropped)
        left = {term for branch in residual.branches if branch in dropped for term in branch.terms}
        terms = tuple(term for term in residual.terms if term not in left)
        point = stream.points[stream.levels[residual.stream.node]]
        taken, out = _now(residual.stream, replaced), _now(residual.out, replaced)
        if branches:
            own = tuple(_branch(branch, replaced) for branch in branches)
            sums.append(Sum(taken, out, _now(terms, replaced), own, residual.write))
        elif terms or out is not taken.node or out is not _now(point, replaced):
            return None
    if not sums:
        return None
    points = tuple(dict.fromkeys(_now(stream.points, replaced)))
    at = {point: index for index, point in enumerate(points)}
    levels = {_now(node, replaced): at[_now(stream.points[level], replaced)] for node, level in stream.levels.items()}
    # It begins where the first branch that is left reads it, and ends with the last sum.
    first = min(levels[node] for node in (sums[0].stream.node, *(branch.read for branch in sums[0].branches)))
    last = levels[sums[-1].out]
    points = points[first : last + 1]
    if any(point not in alive for point in points):
        return None
    within = {node: level - first for node, level in levels.items() if first <= level <= last and node in alive}
    return ResidualStream(tuple(sums), points, within)


def _branch(branch: Branch, replaced: Mapping[fx.Node, fx.Node]) -> Branch:
    """A branch that reads the stream where it did; its own nodes are still those that it had."""
    return replace(
        branch,
        read=_now(branch.read, replaced),
        terms=_now(branch.terms, replaced),
        foreign=_now(branch.foreign, replaced),
        ffn=_now(branch.ffn, replaced),
        gate_up=_now(branch.gate_up, replaced),
    )


def _now(known: T, replaced: Mapping[fx.Node, fx.Node]) -> T:
    """What was known, in terms of the nodes that there are now: a node, or frozen dataclasses and tuples of them."""
    made: object = known
    if isinstance(known, fx.Node):
        made = replaced.get(known, known)
    elif isinstance(known, tuple):
        made = tuple(_now(item, replaced) for item in known)
    elif is_dataclass(known) and not isinstance(known, type):
        made = replace(known, **{field.name: _now(getattr(known, field.name), replaced) for field in fields(known)})
    assert isinstance(made, type(known))
    return made
