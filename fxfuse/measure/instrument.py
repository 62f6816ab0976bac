"""An instrumented graph: it computes what it computed, and then what becomes of that when branches leave or move.

One call of the graph keeps the values that a change starts from. Dropping a branch changes the stream after it and
nothing before, so only what comes after runs again: on the average half of the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, fx

from fxfuse._torch.pytree import tree_leaves
from fxfuse.graph.rerun import Program, Rerun, Values
from fxfuse.measure.recording import BranchRecord
from fxfuse.stream.branch import Branch, Term, number_of_parameters
from fxfuse.stream.finder import ResidualStream, find_streams
from fxfuse.stream.sums import Sum


@dataclass(frozen=True)
class Place:
    """A branch, and where it stands."""

    branch: Branch
    number: int  # of its stream
    stream: ResidualStream
    sum: Sum
    adds: int  # the number of its sum

    def record(self) -> BranchRecord:
        return BranchRecord(
            name=self.branch.name,
            kind=self.branch.kind,
            stream=self.number,
            reads=self.stream.sums_before(self.branch.read),
            adds=self.adds,
            parameters=number_of_parameters(self.branch),
            width=self.branch.ffn.projections[0].width if self.branch.ffn is not None else 0,
            reason=self.branch.reason,
        )


@dataclass(frozen=True)
class _Window:
    """Consecutive FFNs that may read one point: how to compute all but the first there, and what comes after.

    ``steps`` take the stream from the sum of each to the next one's: through casts, and factors of the stream.
    """

    places: tuple[Place, ...]
    jobs: tuple[Rerun, ...]
    steps: tuple[Rerun, ...]
    rest: Rerun


@dataclass(frozen=True)
class Changed:
    """What a change made of the model: new contributions by branch, and new outputs by position."""

    contributions: dict[int, Tensor]
    outputs: dict[int, Tensor]


class Instrumented:
    """A graph of Dynamo whose branches can be dropped and made parallel, each by itself, in the call just made.

    Args:
        gm: the graph, as the plan leaves it; no longer to be changed.
        names: dotted names of its weights.
        max_group: the longest run of consecutive FFNs that is measured as a group.

    Raises:
        CaptureError: the graph cannot be run in part: it draws random numbers or writes to a cache.
    """

    def __init__(self, gm: fx.GraphModule, names: dict[fx.Node, str], max_group: int) -> None:
        self.places = tuple(
            Place(branch, number, stream, each, adds)
            for number, stream in enumerate(find_streams(gm, names))
            for adds, each in enumerate(stream.sums)
            for branch in each.branches
        )
        self._program = Program(gm)
        self._outputs = [
            node if isinstance(node, fx.Node) else None for node in tree_leaves(gm.graph.output_node().args[0])
        ]
        self._owner = {term.node: index for index, place in enumerate(self.places) for term in place.branch.terms}
        ends = {node for node in self._outputs if node is not None}
        self._drops = [self._program.plan({place.sum.out}, ends | set(self._owner)) for place in self.places]
        self._units = [self._hidden(place) for place in self.places]
        self._windows = [self._window(places, ends) for places in _runs(self.places, max_group)]
        jobs = [
            *self._drops,
            *(job for job in self._units if job is not None),
            *(job for window in self._windows for job in (*window.jobs, *window.steps, window.rest)),
        ]
        self._keep = frozenset().union(*(job.given for job in jobs), *map(_held, self.places)) - {None}
        self._kept: Values = {}

    def _hidden(self, place: Place) -> Rerun | None:
        """How to compute the hidden units of an FFN: again, because all of them would be too much to keep."""
        ffn, stream = place.branch.ffn, place.stream
        if ffn is None:
            return None
        level = stream.levels[place.branch.read]
        links = {node for node, own in stream.levels.items() if own == level}
        return self._program.plan({stream.points[level]}, {ffn.down.input}, place.branch.nodes | links)

    def _window(self, places: Sequence[Place], ends: Collection[fx.Node]) -> _Window:
        jobs = []
        for place in places[1:]:  # the first one goes on reading what it reads
            stream, level = place.stream, place.stream.levels[place.branch.read]
            links = {node for node, own in stream.levels.items() if own == level}
            wanted = [term.node for term in place.branch.terms]
            jobs.append(self._program.plan({stream.points[level]}, wanted, place.branch.nodes | links))
        way = frozenset(places[0].stream.levels)
        steps = [self._program.plan({one.sum.out}, {other.sum.stream.node}, way) for one, other in pairwise(places)]
        return _Window(tuple(places), tuple(jobs), tuple(steps), self._program.plan({places[-1].sum.out}, ends))

    @property
    def windows(self) -> list[tuple[str, ...]]:
        """The groups that :meth:`grouped` tries, by branch names."""
        return [tuple(place.branch.name for place in window.places) for window in self._windows]

    def __call__(self, *inputs: object) -> object:
        """Compute what the graph computes; the other methods speak of this call."""
        output, self._kept = self._program.run(inputs, self._keep)
        self.output: list[object] = tree_leaves(output)
        return output

    def forget(self) -> None:
        """Let go of the values of the last call."""
        self._kept, self.output = {}, []

    def contribution(self, index: int) -> Tensor:
        """What branch ``index`` added to the stream: ``[..., d]``, of the stream's dtype."""
        return self._contribution(self.places[index], self._kept)

    def before(self, index: int) -> Tensor:
        """The stream that branch ``index`` is added to: ``[..., d]``."""
        place = self.places[index]
        return scaled(place.sum.stream, self._kept, _tensor(self._kept[place.sum.out]))

    def units(self, index: int) -> Tensor | None:
        """What the hidden units of branch ``index`` are, ``[..., width]``; None if it is no FFN that tells them."""
        job = self._units[index]
        if job is None:
            return None
        (own,) = job.changed
        ((_, hidden),) = self._program.rerun(job, self._kept, {own: _tensor(self._kept[own])})
        return _tensor(hidden)

    def columns(self, index: int) -> Tensor:
        """The length of each column of such an FFN's down projection: float64 ``[width]``, on the CPU."""
        ffn = self.places[index].branch.ffn
        assert ffn is not None
        weight = _tensor(self._kept[ffn.down.weight]).double()
        return weight.square().sum(int(ffn.down.transposed)).sqrt().cpu()

    def dropped(self, index: int) -> Changed:
        """What changes when branch ``index`` contributes nothing."""
        place = self.places[index]
        left = [term for term in place.sum.terms if term not in place.branch.terms]
        changed = self._add_up(self.before(index), left, like=place.sum.out)
        return self._changed(self._drops[index], {place.sum.out: changed})

    def grouped(self) -> Iterator[tuple[tuple[str, ...], Tensor, Changed]]:
        """Each window made parallel: its branches, the stream after it relative to what it was, and what changes.

        The error is ``|x' - x| / |x|`` for each token, float32 ``[...]``.
        """
        for window in self._windows:
            first = window.places[0]
            point = _tensor(self._kept[first.stream.points[first.stream.levels[first.branch.read]]])
            true = _tensor(self._kept[window.places[-1].sum.out])
            made = scaled(first.sum.stream, self._kept, true) + self._contribution(first, self._kept)
            for place, job in zip(window.places[1:], window.jobs, strict=True):
                (own,) = job.changed
                values = dict(self._program.rerun(job, self._kept, {own: point}))
                made = made + self._contribution(place, {**self._kept, **values})
            for place, step in zip(window.places[1:], window.steps, strict=True):
                (own,) = step.changed
                made = made.to(_tensor(self._kept[own]).dtype)
                passed = dict(self._program.rerun(step, self._kept, {own: made}))
                made = scaled(place.sum.stream, {**self._kept, place.sum.stream.node: made, **passed}, true)
            made = made.to(true.dtype)
            error = (made - true).float().norm(dim=-1) / true.float().norm(dim=-1).clamp_min(1e-30)
            yield (
                tuple(place.branch.name for place in window.places),
                error,
                self._changed(window.rest, {window.places[-1].sum.out: made}),
            )

    def _changed(self, job: Rerun, changed: dict[fx.Node, Tensor]) -> Changed:
        contributions: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        new: Values = {}
        for node, made in changed.items():  # it may be an output itself
            outputs.update((position, made) for position, output in enumerate(self._outputs) if output is node)
        for node, value in self._program.rerun(job, self._kept, changed):
            for position in [p for p, output in enumerate(self._outputs) if output is node]:
                outputs[position] = _tensor(value)
            if node not in self._owner:
                continue
            new[node] = value
            terms = {term.node for term in self.places[self._owner[node]].branch.terms}
            if (terms & job.wanted) <= new.keys():
                values = {**self._kept, **{term: new.pop(term) for term in terms & job.wanted}}
                contributions[self._owner[node]] = self._contribution(self.places[self._owner[node]], values)
        return Changed(contributions, outputs)

    def _contribution(self, place: Place, values: Values) -> Tensor:
        stream = _tensor(self._kept[place.sum.out])
        first, *others = (scaled(term, values, stream) for term in place.branch.terms)
        for other in others:
            first = first + other
        return first

    def _add_up(self, start: Tensor, terms: Sequence[Term], like: fx.Node) -> Tensor:
        stream = _tensor(self._kept[like])
        for term in terms:
            start = start + scaled(term, self._kept, stream)
        return start.to(stream.dtype)


def scaled(term: Term, values: Values, stream: Tensor) -> Tensor:
    """What ``term`` adds to its sum, in the shape of the ``stream``: experts may add token by token."""
    made = _tensor(values[term.node])
    made = made.reshape_as(stream) if made.numel() == stream.numel() else made
    for factor in term.scale.nodes:
        made = made * values[factor]  # type: ignore[operator]  # a number or a tensor of one
    return made if term.scale.number == 1.0 else made * term.scale.number


def _held(place: Place) -> set[fx.Node]:
    """The nodes whose values the measurements of a branch read."""
    read = place.stream.points[place.stream.levels[place.branch.read]]
    terms = (place.sum.stream, *place.sum.terms)
    columns = {place.branch.ffn.down.weight} if place.branch.ffn is not None else set()
    return columns | {place.sum.out, read, *(node for term in terms for node in (term.node, *term.scale.nodes))}


def _runs(places: Sequence[Place], longest: int) -> Iterator[tuple[Place, ...]]:
    """All windows of 2 to ``longest`` FFNs that follow each other with nothing between them."""
    for start in range(len(places)):
        end = start + 1
        while end < len(places) and end - start < longest and _follow(places[end - 1], places[end]):
            end += 1
            yield tuple(places[start:end])


def _follow(one: Place, other: Place) -> bool:
    alone = all(len(place.sum.terms) == len(place.branch.terms) == 1 for place in (one, other))
    next_ = other.stream is one.stream and other.adds == one.adds + 1
    reads = all(place.stream.sums_before(place.branch.read) == place.adds for place in (one, other))
    return alone and next_ and reads and one.branch.ffn is not None and other.branch.ffn is not None


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value
