"""A graph as text: a line for each value, its name by its op, the shape that it has when the graph runs.

What names depend on a tracer or a machine are left out. A weight is called what the model calls it, and stands where it
is read. ``-`` marks lines that a pass takes out or changes, ``+`` those that it writes; what only moves has no mark.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxfuse.packing.expressions import PACK
from fxfuse.passes import PassReport
from tests.models.blocks import Traced

_SIGNS = {operator.add: "+", operator.mul: "*", operator.iadd: "+="}


class Names(dict[fx.Node, str]):
    """What nodes are called: weights as in the model, other inputs ``x``, values by op and number (``linear_2``).

    A node keeps its name when a pass has gone over the graph, so that two texts can be compared line by line.
    """

    def __init__(self, weights: dict[fx.Node, str]) -> None:
        super().__init__(weights)
        self._count: Counter[str] = Counter()

    def __missing__(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return str(node.target)
        base = "x" if node.op == "placeholder" else called(node).rpartition(".")[2]
        self._count[base] += 1
        self[node] = base if self._count[base] == 1 else f"{base}_{self._count[base]}"
        return self[node]

    def learn(self, graph: fx.Graph) -> None:
        """Name all nodes, in their order."""
        for node in graph.nodes:
            self[node]

    def told(self, text: str) -> str:
        """``text`` with these names in it instead of the graph's own."""
        own = {node.name: name for node, name in self.items()}
        return re.sub(r"\w+", lambda word: own.get(word[0], word[0]), text)


def called(node: fx.Node) -> str:
    """The name of what a node calls, without the module that it lives in: of ops, the namespace stays."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removeprefix("aten.").removesuffix(".default")
    return node.target if isinstance(node.target, str) else node.target.__name__


class _Shapes(fx.Interpreter):
    """Runs a graph, and keeps the shape of each value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.shapes: dict[fx.Node, str] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        self.shapes[n] = ", ".join(str(list(leaf.shape)) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


@torch.no_grad()
def shapes(traced: Traced) -> dict[fx.Node, str]:
    """The shape of each value, seen by running the graph on copies of its inputs."""
    run = _Shapes(traced.gm)
    run.run(*[value.clone() if isinstance(value, Tensor) else value for value in traced.inputs])
    return run.shapes


def lines(traced: Traced, names: Names) -> dict[fx.Node, str]:
    """What each node computes: its name, its shape, and the call; weights have no line of their own."""
    names.learn(traced.gm.graph)
    known = shapes(traced)
    made: dict[fx.Node, str] = {}
    for node in traced.gm.graph.nodes:
        if node.op == "output":
            made[node] = f"return {_argument(node.args[0], names)}"
        elif node.op != "get_attr" and names[node] not in traced.names.values():
            text = "" if node.op == "placeholder" else f" = {_call(node, names)}"
            packed = f"  # packed: {names.told(node.meta[PACK])}" if PACK in node.meta else ""
            made[node] = f"{names[node]}: {known[node]}{text}{packed}"
    return made


def _call(node: fx.Node, names: Names) -> str:
    args = [_argument(argument, names) for argument in node.args]
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1].removeprefix('(').removesuffix(')')}]"
    if node.target in _SIGNS and node.op == "call_function":
        return f"{args[0]} {_SIGNS[node.target]} {args[1]}"  # type: ignore[index]  # it is a key
    given = [*args, *(f"{key}={_argument(value, names)}" for key, value in node.kwargs.items())]
    if node.op == "call_method":
        return f"{given[0]}.{node.target}({', '.join(given[1:])})"
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        given = [f"{own.name}={text}" for own, text in zip(schema, args, strict=False) if text != "None"]
    return f"{called(node)}({', '.join(given)})"


def _argument(value: object, names: Names) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple):
        inner = ", ".join(_argument(each, names) for each in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(_argument(each, names) for each in value)}]"
    if isinstance(value, slice):
        start, stop = ("" if end is None else _argument(end, names) for end in (value.start, value.stop))
        return f"{start}:{stop}" + ("" if value.step in (None, 1) else f":{value.step}")
    return "..." if value is Ellipsis else repr(value).removeprefix("torch.")


def page(before: dict[fx.Node, str], after: dict[fx.Node, str], names: Names, report: PassReport | None) -> str:
    """Both graphs, and what the pass says that it did."""
    parts = [
        ("before", [f"{' ' if after.get(node) == line else '-'} {line}" for node, line in before.items()]),
        ("after", [f"{' ' if before.get(node) == line else '+'} {line}" for node, line in after.items()]),
    ]
    if report is not None:
        edits = [replace(edit, branches=tuple(map(names.told, edit.branches))) for edit in report.done]
        parts.append(("report", [f"  {line.rstrip()}" for line in str(replace(report, done=edits)).splitlines()]))
    return "\n".join(f"\n{title}\n" + "\n".join(body) for title, body in parts) + "\n"
