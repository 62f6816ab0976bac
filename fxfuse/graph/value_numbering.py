"""When two nodes compute the same thing: structural equality by value numbering (Alpern, Wegman and Zadeck, 1988)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import fx

from fxfuse.graph.ops import is_impure, is_random, op


class Numbering:
    """Numbers for nodes, equal for two nodes exactly if they are the same pure ops on the same values.

    ``leaves`` gives nodes numbers of the caller's choice: two subgraphs are compared up to their leaves.
    """

    def __init__(self, leaves: Mapping[fx.Node, Hashable] | None = None) -> None:
        self._numbers: dict[fx.Node, int] = {}
        self._known: dict[Hashable, int] = {}
        for node, label in (leaves or {}).items():
            self._numbers[node] = self._number(("leaf", label))

    def __getitem__(self, node: fx.Node) -> int:
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._numbers:
                stack.pop()
                continue
            missing = [source for source in current.all_input_nodes if source not in self._numbers]
            if missing:
                stack.extend(missing)
                continue
            self._numbers[current] = self._number(self._key(current))
            stack.pop()
        return self._numbers[node]

    def _number(self, key: Hashable) -> int:
        return self._known.setdefault(key, len(self._known))

    def _key(self, node: fx.Node) -> Hashable:
        if node.op == "get_attr":
            return ("get_attr", str(node.target))
        if node.op not in ("call_function", "call_method") or is_impure(node) or is_random(node):
            return ("unique", node)
        found = op(node)
        if found is not None and found.name in ("add", "mul") and len(node.args) == 2 and not node.kwargs:
            # Commutative: people write both orders.
            return ("commutative", found.name, frozenset((repr(self._freeze(a)), self._freeze(a)) for a in node.args))
        if found is not None:
            return (found.name, tuple((key, self._freeze(value)) for key, value in found.args.items()))
        return (node.op, node.target, self._freeze(node.args), self._freeze(node.kwargs))

    def _freeze(self, value: object) -> Hashable:
        """An argument as something hashable, nodes by their numbers; 1 and 1.0 and True stay different."""
        if isinstance(value, fx.Node):
            return ("node", self._numbers[value])
        if isinstance(value, list | tuple):
            return ("sequence", tuple(self._freeze(item) for item in value))
        if isinstance(value, slice):
            return ("slice", self._freeze((value.start, value.stop, value.step)))
        if isinstance(value, dict):
            return ("dict", tuple((key, self._freeze(item)) for key, item in value.items()))
        return (type(value).__name__, repr(value))
