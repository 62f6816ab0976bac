"""A graph computed again from where a value changed: what the change does not reach is not run again.

The graph is run once, as it is; of its values those are kept that later runs will start from. A later run replaces some
values and computes what depends on them, node by node, as the graph would.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias, TypeVar, cast

from torch import Tensor, fx
from torch.fx.node import Argument, map_arg

from fxfuse.errors import CaptureError
from fxfuse.graph.ops import is_barrier, is_random, mutated_arguments
from fxfuse.graph.order import written_memory

Values: TypeAlias = dict[fx.Node, object]
ArgumentT = TypeVar("ArgumentT", bound=Argument)


@dataclass(frozen=True)
class Rerun:
    """What is to be computed when the values of ``changed`` are others.

    Attributes:
        nodes: in graph order; borders of autocast regions are among them, whatever depends on what.
        wanted: those whose values are asked for.
        given: values of the first run that these nodes take.
        dead: for each node, the values that nobody needs after it.
    """

    changed: frozenset[fx.Node]
    nodes: tuple[fx.Node, ...]
    wanted: frozenset[fx.Node]
    given: frozenset[fx.Node]
    dead: Mapping[fx.Node, tuple[fx.Node, ...]]


class Program:
    """A graph that is run node by node.

    Attributes:
        nodes: its nodes, in order.
        order: the place of each among them.

    Args:
        gm: the graph; it must not be changed afterwards.

    Raises:
        CaptureError: the graph draws random numbers, so that no two runs of it can be compared.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self.nodes = list(gm.graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        random = next((node for node in self.nodes if is_random(node)), None)
        if random is not None:
            raise CaptureError(f"the model draws random numbers ({random.name}): two runs of it cannot be compared")
        memory = written_memory(gm.graph)
        self._sharing: dict[fx.Node, list[fx.Node]] = {}
        for node, region in memory.items():
            self._sharing.setdefault(region, []).append(node)
        self._writes = {
            node: [self._sharing[memory[target]] for target in mutated_arguments(node)]
            for node in self.nodes
            if mutated_arguments(node)
        }

    def plan(
        self, changed: Collection[fx.Node], wanted: Collection[fx.Node], within: Collection[fx.Node] | None = None
    ) -> Rerun:
        """How to compute ``wanted`` anew when the values of ``changed`` are replaced.

        Of ``wanted``, what does not depend on ``changed`` is left out. ``within`` are the nodes that may be computed
        anew; all others keep the value of the first run.

        Raises:
            CaptureError: something that would run twice writes to memory from outside: a cache, an input.
        """
        reached = self._reached(changed, within)
        wanted = frozenset(wanted) & reached
        needed = self._needed(wanted, reached)
        nodes = tuple(node for node in self.nodes if node in needed or is_barrier(node))
        given = {
            source
            for node in nodes
            for source in node.all_input_nodes
            if source not in needed and not is_barrier(source)
        }
        last: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            for source in node.all_input_nodes:
                last[source] = node
        dead: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            dead.setdefault(node, []).append(source)
        changed = frozenset(changed)
        return Rerun(changed, nodes, wanted, frozenset(given - changed), {n: tuple(d) for n, d in dead.items()})

    def _reached(self, changed: Collection[fx.Node], within: Collection[fx.Node] | None) -> set[fx.Node]:
        """What depends on ``changed``, through memory that is written in place too."""
        reached: set[fx.Node] = set()
        start = min(map(self.order.__getitem__, changed))
        pending = True
        while pending:
            pending = False
            for node in self.nodes[start:]:
                if node in reached or node in changed or (within is not None and node not in within):
                    continue
                if not any(source in reached or source in changed for source in node.all_input_nodes):
                    continue
                reached.add(node)
                for region in self._writes.get(node, ()):
                    foreign = next((n for n in region if n.op in ("placeholder", "get_attr") or n in changed), None)
                    if foreign is not None:
                        raise CaptureError(
                            f"the model writes to {foreign.name} in place ({node.name}), so a part of it cannot be run "
                            "twice: call it without a cache (use_cache=False), or write h = h + f instead of h += f"
                        )
                    fresh = set(region) - reached
                    reached |= fresh  # made anew, or the second run would write into the values of the first
                    if fresh:
                        pending = True
                        start = min(start, *(self.order[each] for each in fresh))
        return reached

    def _needed(self, wanted: frozenset[fx.Node], reached: set[fx.Node]) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            stack.extend(source for source in node.all_input_nodes if source in reached)
            for region in self._writes.get(node, ()):
                stack.extend(each for each in region if each in reached)
            stack.extend(user for user in node.users if user in reached and user in self._writes)
        return needed

    def run(self, inputs: Sequence[object], keep: Collection[fx.Node]) -> tuple[object, Values]:
        """Run the whole graph: what it returns, and the values of ``keep``."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                last[source] = node
        dead: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            if source not in keep:
                dead.setdefault(node, []).append(source)
        values: Values = {}
        arguments = iter(inputs)
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "output":
                return _filled(node.args[0], values), {each: values[each] for each in keep}
            else:
                values[node] = self.execute(node, values)
            for each in dead.get(node, ()):
                del values[each]
        raise AssertionError("a graph ends in an output")

    def rerun(
        self, job: Rerun, kept: Mapping[fx.Node, object], changed: Mapping[fx.Node, Tensor]
    ) -> Iterator[tuple[fx.Node, object]]:
        """Compute ``job`` from the ``kept`` values of a run: each wanted node and its new value, as they are made."""
        values: Values = {node: kept[node] for node in job.given}
        values.update(changed)
        for node in job.nodes:
            values[node] = self.execute(node, values)
            if node in job.wanted:
                yield node, values[node]
            for each in job.dead.get(node, ()):
                del values[each]

    def execute(self, node: fx.Node, values: Values) -> object:
        """What ``node`` makes of the values of its inputs."""
        args, kwargs = _filled(node.args, values), _filled(node.kwargs, values)
        match node.op:
            case "call_function":
                assert callable(node.target)
                return node.target(*args, **kwargs)
            case "call_method":
                owner, *rest = args
                return getattr(owner, str(node.target))(*rest, **kwargs)
            case "get_attr":
                return reduce(getattr, str(node.target).split("."), self._gm)
            case _:
                return self._gm.get_submodule(str(node.target))(*args, **kwargs)


def _filled(arguments: ArgumentT, values: Values) -> ArgumentT:
    """``arguments`` with values where nodes stand."""
    return map_arg(arguments, cast("Callable[[fx.Node], Argument]", values.__getitem__))
