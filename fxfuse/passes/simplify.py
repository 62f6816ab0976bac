"""Simplify: one dialect, and nothing in the stream that computes nothing.

Exact. It brings the graph into normal form (:mod:`fxfuse.passes.normalise.normal`), and removes casts to the dtype at
hand, idle dropout, added zeros, and copies that nobody writes to or hands out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxfuse.graph.ops import VIEWS, Op, drops_randomly, op
from fxfuse.graph.order import written_memory
from fxfuse.graph.surgery import erase_dead
from fxfuse.graph.values import dtype, same_shape, value
from fxfuse.passes.base import Control, Edit, Pass, PassReport
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.normalise.dialect import translate
from fxfuse.passes.normalise.normal import normalise
from fxfuse.passes.normalise.sizes import record_sizes
from fxfuse.passes.runner import run


@dataclass(frozen=True)
class Simplify(Pass):
    """See :func:`simplify`."""

    name = "simplify"
    canonical = False
    inputs: Sequence[object] | None = None

    def run(self, graph: Canonical, control: Control) -> PassReport:
        report = PassReport(self.name)
        gm = graph.gm
        report.done += [Edit((node,), action) for node, action in normalise(gm)]
        if self.inputs is not None and record_sizes(gm, self.inputs):
            report.done.append(Edit((), "recorded the sizes of all values"))
            report.done += [Edit((name,), "translated") for name in translate(gm.graph)]  # what only sizes tell
        written = written_memory(gm.graph)
        for node in list(gm.graph.nodes):
            call = op(node)
            source = _identity(node, call) if call is not None else None
            if call is None or source is None:
                continue
            if written.keys().isdisjoint(node.all_input_nodes) and node not in written:
                node.replace_all_uses_with(source)
                erase_dead(gm.graph, [node])
                report.done.append(Edit((node.name,), f"removed {call.name}"))
        return report


def simplify(gm: fx.GraphModule, inputs: Sequence[object] | None = None) -> PassReport:
    """Bring ``gm`` into normal form, its residual adds functional, and remove its identities.

    Args:
        gm: any graph.
        inputs: example inputs of it, for sizes and dtypes if its tracer recorded none (``torch.fx.symbolic_trace``).

    Returns:
        what was done, by node or module name.

    Raises:
        CaptureError, OptionError: the graph does not run on ``inputs``.
    """
    return run(gm, Simplify(inputs))


def _identity(node: fx.Node, found: Op) -> fx.Node | None:
    """The value that ``node`` passes on unchanged, or None."""
    source = found.node("input")
    if found.name == "cast" and source is not None:
        known = dtype(source)
        plain = known is not None and known == found.args.get("dtype") and "copy" not in node.kwargs
        return source if plain and "memory_format" not in node.kwargs else None
    if found.name == "dropout" and not drops_randomly(found) and not found.inplace:
        return source
    if found.name == "clone" and "memory_format" not in found.args:
        return source if all(_only_computes(user) for user in node.users) else None
    if found.name == "add" and not found.inplace:
        for one, other in (("input", "other"), ("other", "input")):
            zeros, kept = found.args.get(one), found.node(other)
            if kept is None or not _is_zeros(zeros):
                continue
            if one == "input" and found.args.get("alpha", 1) != 1:
                continue
            if value(kept) is not None and same_shape(kept, node) and dtype(kept) == dtype(node):
                return kept
    return None


def _only_computes(node: fx.Node) -> bool:
    """Whether what ``node`` makes cannot be the memory of an input, which the caller might get to write to."""
    found = op(node)
    return found is not None and found.name not in VIEWS


def _is_zeros(argument: object) -> bool:
    """Whether it is a tensor of zeros, or the number 0, with which Python's ``sum`` begins."""
    if not isinstance(argument, fx.Node):
        return isinstance(argument, int | float) and argument == 0
    found = op(argument)
    return (found is not None and found.name == "zeros_like") or argument.target is torch.zeros
