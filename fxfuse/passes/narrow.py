"""Narrow: an FFN keeps some of its hidden units, computes these alone, and its down projection reads these alone.

Source: Puzzle (arXiv 2411.19146), which takes the units of largest mean ``|activation| * ||down column||``. Here which
ones they are is the plan's; :mod:`fxfuse.measure.units` ranks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import fx

from fxfuse._common.units import Narrowed, Units
from fxfuse.errors import PlanError
from fxfuse.ffn.anatomy import FFN, Projection
from fxfuse.graph.peel import layer
from fxfuse.graph.surgery import erase_dead
from fxfuse.graph.values import product, same_shape, shape, sized, value
from fxfuse.packing import expressions as pack
from fxfuse.passes.base import Control, Edit, Pass, PassReport
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.compatible import TRANSPARENT
from fxfuse.passes.runner import run
from fxfuse.passes.select import check_known, owners_of
from fxfuse.stream.branch import KEPT, STAMP, Branch


@dataclass(frozen=True)
class Narrow(Pass):
    """See :func:`narrow`."""

    name = "narrow"
    units: Narrowed

    def run(self, graph: Canonical, control: Control) -> PassReport:
        report = PassReport(self.name)
        if not self.units:
            return report
        check_known(self.units, graph.streams)
        owners = owners_of(graph.streams)
        for stream in graph.streams:
            for branch in stream.branches:
                if branch.name not in self.units:
                    continue
                units = self.units[branch.name]
                ffn = narrowable(branch, units)
                width = ffn.projections[0].width
                if width == len(units):
                    continue  # they have left the model already, or are all that there are
                left = _Rewriter(graph, branch, ffn, units).run()
                for node in left:
                    if owners[node] == 1:
                        node.meta[KEPT] = branch.name  # it goes on reading the stream where it stood
                detail = f"{len(units)} of {width} hidden units"
                detail += f"; {len(left)} of its nodes serve others and stay" if left else ""
                report.done.append(Edit((branch.name,), "narrowed", detail))
        return report


def narrow(gm: fx.GraphModule, units: Mapping[str, Units]) -> PassReport:
    """Let each named FFN compute some of its hidden units only.

    ``down(f(p_1(x), ..., p_n(x)))`` becomes ``down[:, units](f(p_1[units](x), ...))``: rows of the projections and of
    what the activation takes of weights, columns of the down projection; biases of the output stay. Of a branch that
    has just so many units, they have left the model already, and it stays as it is. What others read of the hidden
    units (a graph output) goes on to be all of them.

    Args:
        gm: any graph that has residual streams.
        units: of each FFN by name the units that it keeps, ascending.

    Raises:
        PlanError: no branch has such a name; it is no FFN of a form whose hidden units are told apart, routed experts
            among them; or it has no unit of such a number. The graph is then as it was.
    """
    return run(gm, Narrow(Narrowed(units)))


def narrowable(branch: Branch, units: Units) -> FFN:
    """The anatomy of a branch that can keep these units.

    Raises:
        PlanError: it cannot.
    """
    ffn = branch.ffn
    if ffn is None:
        if branch.kind == "moe":
            raise PlanError(f"{branch.name!r} cannot be narrowed: its experts are routed, and have units of their own")
        if branch.kind not in ("gated_ffn", "ffn"):
            raise PlanError(f"{branch.name!r} is no FFN but of kind {branch.kind}: narrow is for FFNs")
        raise PlanError(f"{branch.name!r} cannot be narrowed: {branch.reason}")
    if ffn.quantized is not None:
        raise PlanError(f"{branch.name!r} cannot be narrowed: its weights are quantized; prune the model before that")
    if ffn.reduction is not None:
        raise PlanError(f"{branch.name!r} cannot be narrowed: its units are spread over processes; prune before that")
    width = ffn.projections[0].width
    if units[-1] >= width and len(units) != width:
        raise PlanError(
            f"narrow[{branch.name!r}] keeps unit {units[-1]}, and the FFN has {width}, the last of which is {width - 1}"
        )
    return ffn


class _Rewriter:
    """Writes one narrowed FFN: each node where the one that it replaces stands, so that regions stay theirs."""

    def __init__(self, graph: Canonical, branch: Branch, ffn: FFN, units: Units) -> None:
        self._canonical, self._graph = graph, graph.graph
        self._branch, self._ffn, self._units = branch, ffn, units

    def run(self) -> list[fx.Node]:
        """Rewrite; the old nodes that others use and that stay."""
        ffn = self._ffn
        source = self._source()
        new = {projection.output: self._projected(projection, source) for projection in ffn.projections}
        new |= {constant: self._constant(constant) for constant in ffn.constants}
        for node in ffn.middle:
            if (taken := layer(node, TRANSPARENT)) is not None:
                new[node] = new[taken.source]
                continue
            with self._graph.inserting_before(node):
                new[node] = self._graph.node_copy(node, lambda old: new.get(old, old))
            new[node].meta = {}
            self._size(new[node], node, len(self._units))
        down = ffn.down.output
        made = self._down(new[ffn.down.input])
        down.replace_all_uses_with(made)
        # The term itself, perhaps: the branch goes on to be called what it was.
        made.meta |= {key: down.meta[key] for key in ("example_value", "val", STAMP) if key in down.meta}
        old = [down, *ffn.middle, *(projection.output for projection in ffn.projections)]
        erased = erase_dead(self._graph, [down])
        return [node for node in old if node not in erased and node not in new.values()]

    def _source(self) -> fx.Node:
        """What the projections read; a copy of it, where it holds something else later."""
        source = self._ffn.projections[0].input
        if source not in self._canonical.overwritten:
            return source
        first = next(node for node in self._branch.body if source in node.all_input_nodes)
        with self._graph.inserting_before(first):
            copied = self._graph.call_method("clone", (source,))
        copied.meta["example_value"] = value(source)
        return copied

    def _projected(self, projection: Projection, source: fx.Node) -> fx.Node:
        """The units' rows of a projection, ``[..., units]``, with the leading sizes of what it reads."""
        graph, count = self._graph, len(self._units)
        with graph.inserting_before(projection.output):
            weight = pack.weight_of(graph, projection)
            weight = pack.kept(graph, weight, 0, self._units, projection.weight, count, projection.fan_in)
            bias = pack.bias_of(graph, projection)
            if bias is not None and projection.bias is not None:
                bias = pack.kept(graph, bias, 0, self._units, projection.bias, count)
            made = graph.call_function(F.linear, (source, weight, bias))
        self._size(made, projection.output, count)
        return made

    def _constant(self, constant: fx.Node) -> fx.Node:
        """What the activation takes of a weight: one number for all units, or the numbers of those that are kept."""
        sizes = shape(constant) or ()
        if product(sizes) == 1:
            return constant
        first = next(node for node in self._ffn.middle if constant in node.all_input_nodes)
        others = [size for size in sizes[:-1] if isinstance(size, int)]  # all of them are 1
        with self._graph.inserting_before(first):
            return pack.kept(self._graph, constant, len(others), self._units, constant, *others, len(self._units))

    def _down(self, hidden: fx.Node) -> fx.Node:
        """What the down projection makes of the units, in the sizes that its output has."""
        graph, projection = self._graph, self._ffn.down
        with graph.inserting_before(projection.output):
            weight = pack.weight_of(graph, projection)
            sizes = projection.width, len(self._units)
            weight = pack.kept(graph, weight, 1, self._units, projection.weight, *sizes)
            made = graph.call_function(F.linear, (hidden, weight, pack.bias_of(graph, projection)))
            self._size(made, projection.output, projection.width)
            inner, outer = shape(self._ffn.projections[0].input), shape(projection.output)
            if inner is None or outer is None or inner[:-1] == outer[:-1]:
                return made
            if len(outer) == 2:
                return graph.call_method("flatten", (made, 0, -2))
            if not same_shape(self._branch.read, projection.output):
                raise PlanError(
                    f"{self._branch.name!r} cannot be narrowed: it reads tokens as {inner[:-1]}, gives them back as "
                    f"{outer[:-1]}, and neither is how the stream has them"
                )
            return graph.call_method("reshape_as", (made, self._branch.read))

    def _size(self, made: fx.Node, like: fx.Node, width: int) -> None:
        """Let a new node have the tokens of what the FFN reads, so many features, and the dtype of ``like``."""
        read = value(self._ffn.projections[0].input)
        if read is not None and (known := sized(like, *read.shape[:-1], width)) is not None:
            made.meta["example_value"] = known
