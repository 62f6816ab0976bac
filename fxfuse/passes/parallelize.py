"""Parallelize: the members of a group read one point of the stream, and the sum of what they contribute is added there.

Source: FFN Fusion (arXiv 2503.18908), whose groups are FFNs; Layer Parallelism (arXiv 2502.02790), whose groups are
pairs of attentions and pairs of FFNs; and the former's appendix B, whose members are whole blocks: private sequences.
This is the one rewrite that approximates. Fusing what it made parallel is exact, and another pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxfuse.errors import PlanError
from fxfuse.graph.ops import mutated_arguments
from fxfuse.graph.order import Stuck, sort
from fxfuse.graph.peel import Change, peel
from fxfuse.graph.values import dtype, same_shape
from fxfuse.passes.base import Control, Edit, Pass, PassReport
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.runner import run
from fxfuse.passes.select import check_known
from fxfuse.plan import Group, flat
from fxfuse.stream.branch import Branch, Term
from fxfuse.stream.finder import ResidualStream
from fxfuse.stream.rewrite import add_up, resum, shaped
from fxfuse.stream.sums import Sum


@dataclass(frozen=True)
class Parallelize(Pass):
    """See :func:`parallelize`."""

    name = "parallelize"
    groups: tuple[Group, ...]

    def run(self, graph: Canonical, control: Control) -> PassReport:
        report = PassReport(self.name)
        if not self.groups:
            return report
        by_stream = _by_stream(self.groups, graph.streams)
        hazard, region, rewritten = graph.hazards, graph.regions, graph.overwritten
        moved: list[Branch] = []
        replaced: dict[fx.Node, fx.Node] = {}
        for stream, own in by_stream.items():
            rewriter = _Rewriter(graph.gm, stream, own, replaced, rewritten)
            rewriter.run()
            moved += rewriter.moved
            _copy_hazards(hazard, rewriter.clones)
        try:
            sort(graph.graph, hazard, region)
        except Stuck as stuck:
            raise PlanError(_explain(stuck, moved)) from stuck
        report.done.extend(Edit(flat(group), "made parallel") for group in self.groups)
        return report


def parallelize(gm: fx.GraphModule, groups: Sequence[Group]) -> PassReport:
    """Make each group of branches parallel.

    A group stands where that of its branches stands that comes first in the stream: its members read the very value
    that the first one reads, and what they contribute is added in the sum that the first one is added in. A member that
    is a sequence runs in its order on a copy of the stream of its own. All other readers see the stream as the groups
    leave it.

    Where the model scales its stream, ``h <- c * (a * h + b * f(h))``, a member takes along its own factor b, which is
    a part of the branch; a and c stay with the sum. So a contribution is scaled by every factor that comes after the
    place where its group stands, and by none of those before. On a copy of the stream there are no such factors: what a
    member of a sequence reads is the point where the group stands plus what those before it contribute.

    Raises:
        PlanError: an unknown name, members of several streams, or a member that needs a value made only after the
            place where the group stands. The graph is then as it was.
    """
    return run(gm, Parallelize(tuple(groups)))


def _by_stream(groups: Sequence[Group], streams: Sequence[ResidualStream]) -> dict[ResidualStream, list[Group]]:
    check_known((name for group in groups for name in flat(group)), streams)
    home = {branch.name: stream for stream in streams for branch in stream.branches}
    by_stream: dict[ResidualStream, list[Group]] = {}
    for group in groups:
        first = home[flat(group)[0]]
        for name in flat(group):
            if home[name] is not first:
                names = f"{name!r} and {flat(group)[0]!r}"
                raise PlanError(f"{names} belong to different residual streams; no group holds both")
        by_stream.setdefault(first, []).append(group)
    return by_stream


def _copy_hazards(hazard: dict[fx.Node, set[fx.Node]], clones: Mapping[fx.Node, fx.Node]) -> None:
    """Let each clone stay after the writes that its original stays after, and before those that it stays before."""
    for clone, node in clones.items() if hazard else ():
        hazard[clone] = set(hazard.get(node, ()))
        for before in hazard.values():
            if node in before:
                before.add(clone)


def _explain(stuck: Stuck, moved: Sequence[Branch]) -> str:
    for branch in moved:
        waits = [node for node in branch.foreign if node in stuck.nodes]
        if waits:
            return (
                f"{branch.name!r} needs {waits[0].name}, a value that is made only after where its group stands "
                "(shared keys and values, a value residual, a cache write); leave it out of the group"
            )
    names = [branch.name for branch in moved if any(node in stuck.nodes for node in branch.body)]
    names = names or [branch.name for branch in moved]  # it may be their sum that is stuck
    what = f"{', '.join(map(repr, names))}" if names else f"node {stuck.first.name}"
    return f"{what}: cannot be made parallel, because {stuck.why}"


class _Rewriter:
    """Edits one stream; the order of the graph's nodes is mended afterwards."""

    def __init__(
        self,
        gm: fx.GraphModule,
        stream: ResidualStream,
        groups: Sequence[Group],
        replaced: dict[fx.Node, fx.Node],
        overwritten: Container[fx.Node],
    ) -> None:
        self._graph, self._stream = gm.graph, stream
        self._replaced, self._overwritten = replaced, overwritten
        self.clones: dict[fx.Node, fx.Node] = {}
        self._place = {b: (i, j) for i, residual in enumerate(stream.sums) for j, b in enumerate(residual.branches)}
        self._owners = Counter(node for branch in stream.branches for node in branch.body)
        self._groups: dict[Sum, list[Group]] = {}
        self.moved: list[Branch] = []
        for group in groups:
            self._groups.setdefault(stream.sums[self._place[self._first(group)][0]], []).append(group)

    def _first(self, group: Group) -> Branch:
        return min((self._stream[name] for name in flat(group)), key=self._place.__getitem__)

    def _now(self, level: int) -> fx.Node:
        """A point of the stream, as it stands now."""
        point = self._stream.points[level]
        return self._replaced.get(point, point)

    def _point(self, branch: Branch) -> fx.Node:
        """The point of the stream that ``branch`` reads, as it stands now."""
        return self._now(self._stream.levels[branch.read])

    def run(self) -> None:
        leaving = [self._stream[name] for groups in self._groups.values() for group in groups for name in flat(group)]
        gone = {term for branch in leaving for term in branch.terms}
        for residual in self._stream.sums:
            groups = self._groups.get(residual, [])
            if not groups and not any(term in gone for term in residual.terms):
                continue
            terms = [term for term in residual.terms if term not in gone]
            for group in groups:
                level = self._stream.levels[self._first(group).read]
                if self._stream.points[level] in self._overwritten:
                    what = "the stream where its group stands is overwritten in place later"
                    raise PlanError(f"{self._first(group).name!r}: {what}")
                for member in group:
                    names = (member,) if isinstance(member, str) else member
                    terms += self._sequence([self._stream[name] for name in names], level)
            resum(self._graph, residual, terms, self._replaced, self._overwritten)

    def _sequence(self, branches: Sequence[Branch], level: int) -> list[Term]:
        """Run ``branches`` in order on a private copy of the stream at ``level``; what they contribute.

        A branch sees what stands before it in the sequence, unless the model itself computes the two from one point
        (parallel attention and FFN).
        """
        terms: list[Term] = []
        point = self._now(level)
        for index, branch in enumerate(branches):
            seen = [term for earlier in branches[:index] if self._sees(branch, earlier) for term in earlier.terms]
            read = point
            if seen:
                with self._graph.inserting_before(branch.body[0]):
                    read = add_up(self._graph, point, seen, self._point(branch))
            self._reread(branch, read, level)
            terms += branch.terms
        return terms

    def _sees(self, branch: Branch, earlier: Branch) -> bool:
        if self._place[earlier][0] > self._place[branch][0]:
            return True  # the plan turned their order round
        added = self._stream.sums[self._place[earlier][0]].out
        return self._stream.levels[added] <= self._stream.levels[branch.read]

    def _reread(self, branch: Branch, read: fx.Node, level: int) -> None:
        """Let ``branch`` read the stream at ``read``, which has the rows that the stream has at ``level``.

        Nodes that other branches use too (a common norm) are cloned.
        """
        own, old = self._stream.levels[branch.read], self._point(branch)
        if old is read:
            return
        if branch.crossing:
            raise PlanError(
                f"{branch.name!r} cannot be moved in a group: {branch.crossing[0].name}, a sum of another residual "
                "stream, is a part of it, and would move along although others read it too; leave it out of the group"
            )
        if dtype(old) != dtype(read):
            raise PlanError(f"{branch.name!r} reads a stream of {dtype(old)}, its group one of {dtype(read)}")
        self.moved.append(branch)
        new: dict[fx.Node, fx.Node] = {}
        if read is self._now(level):
            points = [node for node, of in self._stream.levels.items() if of == own]
            new = {node: twin for node in [*points, old] if (twin := self._twin(node, level)) is not None}
        if old not in new:
            with self._graph.inserting_before(old):
                new[old] = read if same_shape(read, old) else shaped(self._graph, read, old)
        for node in branch.body:
            if self._owners[node] > 1:
                if mutated_arguments(node):
                    raise PlanError(f"{branch.name!r} shares {node.name}, which writes memory, with another branch")
                with self._graph.inserting_before(node):
                    new[node] = self._graph.node_copy(node, lambda source: self._renewed(source, own, new))
                self.clones[new[node]] = node
                self._owners[node] -= 1
                continue
            for source in node.all_input_nodes:
                renewed = self._renewed(source, own, new)
                if renewed is not source:
                    node.replace_input_with(source, renewed)

    def _renewed(self, source: fx.Node, level: int, new: dict[fx.Node, fx.Node]) -> fx.Node:
        """What stands for ``source`` in a branch that moved: a clone, the new read point, or a cast of that."""
        if source not in new and self._stream.levels.get(source) == level:
            with self._graph.inserting_before(source):
                new[source] = self._graph.node_copy(source, lambda inner: self._renewed(inner, level, new))
        return new.get(source, source)

    def _twin(self, node: fx.Node, level: int) -> fx.Node | None:
        """The stream at ``level`` in the shape of ``node``, if the graph has it: a point, or but views of one."""
        if not self._only_viewed(node):
            return None
        held = [other for other, of in self._stream.levels.items() if of == level and self._only_viewed(other)]
        return next((self._replaced.get(other, other) for other in held if same_shape(other, node)), None)

    def _only_viewed(self, node: fx.Node) -> bool:
        """Whether no cast stands between ``node`` and the point of the stream that it comes from."""
        points = self._stream.points
        return peel(node, Change.ROWS, within=lambda inner: inner not in points) in points
