"""A graph run in stages, for many inputs side by side: each run stops where something is to be decided.

All runs stand at the same stage, and each holds only the values that are still needed. What a decision is about, the
nodes ``again`` of a stage, can be computed as often as one likes before the runs go on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from fxfuse._torch.ops import REGIONS
from fxfuse.errors import CaptureError
from fxfuse.graph.ops import is_barrier
from fxfuse.graph.rerun import Program, Rerun, Values


@dataclass(frozen=True)
class Stage:
    """A place where the runs of a graph stop.

    Attributes:
        seen: the nodes whose values are looked at here.
        again: how to compute some of them for other weights; None if nothing is decided here.
    """

    seen: frozenset[fx.Node]
    again: Rerun | None = None

    @property
    def decided(self) -> frozenset[fx.Node]:
        """The nodes that the stage computes for itself."""
        return frozenset(node for node in self.again.nodes if not is_barrier(node)) if self.again else frozenset()

    @property
    def needed(self) -> frozenset[fx.Node]:
        """The values that the run has to have before."""
        return (self.seen | (self.again.given if self.again else frozenset())) - self.decided


class Route:
    """The order in which stages run the nodes of a graph, and when each value is let go; all runs share it.

    Args:
        program: the graph.
        stages: in graph order. No two compute the same node again.

    Raises:
        CaptureError: a stage would stop inside an autocast region.
    """

    def __init__(self, program: Program, stages: Sequence[Stage]) -> None:
        self.program, self.stages = program, tuple(stages)
        self.parts: list[list[fx.Node]] = []
        later = set().union(*(stage.decided for stage in stages))
        done = {node for node in program.nodes if node.op == "placeholder"}
        end = 0
        for stage in stages:
            end = max([end, *(program.order[node] + 1 for node in stage.needed)])
            _check_closed(program.nodes[:end])
            run: list[fx.Node] = []
            for node in program.nodes[:end]:
                if node not in done and node not in later and all(source in done for source in node.all_input_nodes):
                    done.add(node)
                    run.append(node)
            self.parts.append(run)
            later -= stage.decided
            done |= stage.decided
        self.dead = self._dead()

    def _dead(self) -> Mapping[tuple[int, int], list[fx.Node]]:
        """The values that nobody takes any more after the n-th node of a stage; after all of it, n is their number."""
        last: dict[fx.Node, tuple[int, int]] = {}
        for number, (stage, part) in enumerate(zip(self.stages, self.parts, strict=True)):
            for index, node in enumerate(part):
                last[node] = number, index
                last.update((source, (number, index)) for source in node.all_input_nodes)
            last.update((node, (number, len(part))) for node in stage.needed | stage.decided)
        dead: dict[tuple[int, int], list[fx.Node]] = defaultdict(list)
        for node, when in last.items():
            if node.op != "placeholder":
                dead[when].append(node)
        return dead


class Walk:
    """One run of a graph along a route."""

    def __init__(self, route: Route, inputs: Sequence[object]) -> None:
        self._route, self._stage = route, 0
        placeholders = (node for node in route.program.nodes if node.op == "placeholder")
        self.values: Values = dict(zip(placeholders, inputs, strict=True))

    def reach(self) -> None:
        """Run up to the next stage: ``values`` then holds what is seen there, but for what is decided there."""
        for index, node in enumerate(self._route.parts[self._stage]):
            self.values[node] = self._route.program.execute(node, self.values)
            self._forget(index)

    def attempt(self, weights: Mapping[fx.Node, Tensor]) -> Values:
        """What is decided here and wanted, with some of its weights replaced; the run stays as it is."""
        again = self._route.stages[self._stage].again
        assert again is not None  # or there is nothing to try
        own = {node: value for node in again.changed if isinstance(value := self.values[node], Tensor)}
        return dict(self._route.program.rerun(again, self.values, {**own, **weights}))

    def leave(self, weights: Mapping[fx.Node, Tensor], instead: Mapping[fx.Node, Tensor] | None = None) -> None:
        """Decide for ``weights`` and those that are there, and let go of what was only looked at.

        ``instead`` are values that stand for what was decided.
        """
        if self._route.stages[self._stage].again is not None:
            made = self.attempt(weights)
            self.values.update(weights)
            self.values.update(made)
        self.values.update(instead or {})
        self._forget(len(self._route.parts[self._stage]))
        self._stage += 1

    def _forget(self, index: int) -> None:
        for node in self._route.dead.get((self._stage, index), ()):
            self.values.pop(node, None)  # some are computed and used within the stage's decision


def _check_closed(nodes: Sequence[fx.Node]) -> None:
    names = Counter(getattr(node.target, "__name__", "") for node in nodes if is_barrier(node))
    if any(names[enter] != names[leave] for enter, leave in REGIONS):
        raise CaptureError(
            "the model's residual stream runs through an autocast region of its own, and a run cannot stop there: "
            "take autocast out of its forward, or convert the model to the dtype instead"
        )
