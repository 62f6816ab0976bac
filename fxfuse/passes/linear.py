"""Linear: one linear map of each token takes the place of an attention: ``W norm(x) + b``, its output projection's own.

Source: NBL (arXiv 2505.21077), which fits W; the linear blocks of Puzzle (arXiv 2411.19146). Here W is what the output
projection holds. What follows it in the branch stays: a scale, a norm, dropout.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxfuse.errors import PlanError
from fxfuse.ffn.projection import projection
from fxfuse.graph.ancestors import ancestors
from fxfuse.graph.constant import weight_only
from fxfuse.graph.paths import common_path
from fxfuse.graph.sharded import is_spread
from fxfuse.graph.surgery import erase_dead, erase_empty_regions, transaction
from fxfuse.graph.values import dtype, parameters, same_rows, same_shape, sizes_only, value
from fxfuse.passes.base import Control, Edit, Pass, PassReport
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.normalise.normal import normalise
from fxfuse.passes.runner import run
from fxfuse.passes.select import branch_names, check_known, owners_of, settle
from fxfuse.stream.branch import KEPT, Branch, parameters_of, stamp
from fxfuse.stream.ends import Ends, ends_of
from fxfuse.stream.finder import ResidualStream, find_streams
from fxfuse.stream.rewrite import shaped


@dataclass(frozen=True)
class OwnMap:
    """``weight @ x + bias`` in the place of an attention whose output projection reads too many features for that.

    Attributes:
        weight: ``[d, width]``, where ``width`` is that of what the attention reads.
        bias: ``[d]``, or None.
    """

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Linear(Pass):
    """See :func:`linear`."""

    name = "linear"
    branches: frozenset[str]
    maps: Mapping[str, OwnMap] = field(default_factory=dict, compare=False)

    def run(self, graph: Canonical, control: Control) -> PassReport:
        report = PassReport(self.name)
        if not self.branches:
            return report
        check_known(self.branches, graph.streams)
        facts = Facts.of(graph.gm)
        owners = owners_of(graph.streams)
        for stream in graph.streams:
            for branch in stream.branches:
                if branch.name not in self.branches or branch.kind == "linear":
                    continue  # one that is a linear map already contributes what the plan asks for
                kept = _rewrite(graph, branch, self._ends(graph, branch, stream, facts), owners)
                detail = f"{kept} of its nodes serve others and stay" if kept else ""
                report.done.append(Edit((branch.name,), "made linear", detail))
        erase_empty_regions(graph.graph)
        return report

    def _ends(self, graph: Canonical, branch: Branch, stream: ResidualStream, facts: Facts) -> Ends:
        """The branch's ends, the last of which is its own map if it has one."""
        if branch.name not in self.maps:
            return fitting_ends(branch, stream, facts)
        return _with_own(graph, branch, attention_ends(branch, stream, facts), facts, self.maps[branch.name])


def linear(gm: fx.GraphModule, branches: Collection[str], maps: Mapping[str, OwnMap] | None = None) -> PassReport:
    """Let each named attention contribute what its output projection makes of its norm's output.

    ``h + f(o(attend(q(x), k(x), v(x))))`` with ``x = norm(h)`` becomes ``h + f(o(x))``; the branch reads the stream
    where it did, and keeps its name. Queries, keys, values and scores leave the graph, but for a part that others read
    (keys and values as graph outputs, a write to a cache): it stays, and the report says so. A branch that is such a
    map already stays as it is.

    Args:
        gm: any graph that has residual streams.
        branches: names.
        maps: by name, what takes the place of the output projection too, as attributes of the graph's module.

    Raises:
        PlanError: no branch has such a name; it is no attention; its output projection does not map the width of the
            stream to itself and it has no other map, or where it begins and ends cannot be told. The graph is then as
            it was.
    """
    return run(gm, Linear(frozenset(branches), maps or {}))


@dataclass(frozen=True)
class Facts:
    """What the ends of a branch are told by: the nodes that depend on weights alone, and those that tell only sizes."""

    weights: set[fx.Node]
    sizes: set[fx.Node]

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Facts:
        return cls(weight_only(gm, parameters(gm)), sizes_only(gm.graph))


def attention_ends(branch: Branch, stream: ResidualStream, facts: Facts) -> Ends:
    """Where an attention begins and ends.

    Raises:
        PlanError: it is none, or nobody can tell.
    """
    if branch.kind != "attention":
        raise PlanError(f"{branch.name!r} is no attention but of kind {branch.kind}: linear is for attention")
    if any(map(is_spread, branch.body)):
        raise PlanError(
            f"{branch.name!r} cannot be made linear: its projections are spread over several processes, and no process "
            "has the rows for the whole of its input. fxfuse.prune the model before it is sharded"
        )
    terms = [term.node for term in branch.terms]
    ends = ends_of(terms, branch.body, stream.levels, facts.weights, facts.sizes)
    if isinstance(ends, str):
        raise PlanError(f"{branch.name!r} cannot be made linear: {ends}")
    return ends


def fitting_ends(branch: Branch, stream: ResidualStream, facts: Facts) -> Ends:
    """The same of an attention whose output projection can read what its first projections read.

    Raises:
        PlanError: it is none; or the projection reads another number of features.
    """
    ends = attention_ends(branch, stream, facts)
    if ends.output.fan_in != ends.width:
        raise PlanError(
            f"{branch.name!r} cannot be made linear in its graph: its output projection reads {ends.output.fan_in} "
            f"features, and its input has {ends.width}. fxfuse.prune and fxfuse.apply put a linear map of {ends.width} "
            "features in its place"
        )
    return ends


@dataclass(frozen=True)
class OutputMap:
    """The output projection of an attention, as its model has it.

    Attributes:
        path: the path of its weights, from the module that the branch is named after.
        reads: how many features it reads.
        width: how many the branch's input has.
    """

    path: str
    reads: int
    width: int

    @property
    def fits(self) -> bool:
        """Whether it can read the branch's input."""
        return self.reads == self.width


def output_maps(gm: fx.GraphModule, names: Collection[str]) -> tuple[dict[str, OutputMap | None], tuple[str, ...]]:
    """The output projections of those attentions named that a graph holds, and the names of all its branches.

    None stands for that of a branch which is a linear map already.

    Raises:
        PlanError: one is no attention, nobody can tell where it ends, or that is not in the module of its name.
    """
    maps: dict[str, OutputMap | None] = {}
    with transaction(gm):
        normalise(gm)
        streams = find_streams(gm)
        settle(names, streams)
        weights, facts = parameters(gm), Facts.of(gm)
        for stream in streams:
            for branch in stream.branches:
                if branch.name not in names:
                    continue
                if branch.kind == "linear":
                    maps[branch.name] = None
                    continue
                ends = attention_ends(branch, stream, facts)
                held = parameters_of((ends.product,), weights, facts.weights)
                path = common_path(weights[node] for node in held)
                if not path.startswith(f"{branch.name}."):
                    where = repr(path) if path else "no module of its own"
                    raise PlanError(f"{branch.name!r} cannot be made linear: its output projection is in {where}")
                own = path.removeprefix(f"{branch.name}.")
                maps[branch.name] = OutputMap(own, ends.output.fan_in, ends.width)
    return maps, branch_names(streams)


def linear_places(gm: fx.GraphModule, names: Mapping[fx.Node, str]) -> dict[str, OwnMap | None]:
    """Those attentions that can be made linear, each with a map of zeros, or None if its output projection can be one.

    A map is like the projection that it takes the place of, in dtype and device.

    Args:
        gm: a graph that has residual streams; what it computes stays.
        names: of its weights.
    """
    made: dict[str, OwnMap | None] = {}
    with transaction(gm):
        normalise(gm)
        facts = Facts.of(gm)
        for stream in find_streams(gm, names):
            for branch in stream.branches:
                if branch.kind != "attention":
                    continue
                try:
                    made[branch.name] = _zeros(branch, attention_ends(branch, stream, facts), facts)
                except PlanError:
                    continue
    return made


def _zeros(branch: Branch, ends: Ends, facts: Facts) -> OwnMap | None:
    """A map of zeros in the place of the output projection, or None if that can be the map.

    Raises:
        PlanError: no map fits there.
    """
    if ends.output.fan_in == ends.width:
        return None
    _product_of(branch, ends, facts)  # for what it refuses
    if (known := value(ends.output.weight)) is None:
        raise PlanError(f"{branch.name!r} cannot be made linear: of what dtype its projection is is not known")
    zeros = partial(torch.zeros, dtype=known.dtype, device=known.device)  # the value may be fake
    return OwnMap(zeros(ends.output.width, ends.width), None if ends.output.bias is None else zeros(ends.output.width))


def _with_own(graph: Canonical, branch: Branch, ends: Ends, facts: Facts, own: OwnMap) -> Ends:
    """The branch with a map of its own as its last projection, which still reads what that one read."""
    last, number = _product_of(branch, ends, facts), len(dict(graph.gm.named_buffers()))
    given: list[fx.Node] = []
    for name, tensor in (("weight", own.weight), ("bias", own.bias)):
        if tensor is not None:
            held = f"linear_{number}_{name}"
            graph.gm.register_buffer(held, tensor, persistent=False)
            with graph.graph.inserting_before(last):
                given.append(graph.graph.get_attr(held))
    last.op, last.target, last.args, last.kwargs = "call_function", F.linear, (ends.source, *given), {}
    return replace(ends, product=last)


def _product_of(branch: Branch, ends: Ends, facts: Facts) -> fx.Node:
    """The node whose place a map of the branch's own takes.

    Raises:
        PlanError: the map would not fit there.
    """
    last = _with_bias(ends, facts)
    if not same_shape(last, ends.product):
        raise PlanError(f"{branch.name!r} cannot be made linear: the bias of its projection is added in another shape")
    if not any(same_rows(node, ends.source) for node in (*ends.read, ends.input)):
        raise PlanError(f"{branch.name!r} cannot be made linear: it flattens what it reads, and the map would not fit")
    return last


def _with_bias(ends: Ends, facts: Facts) -> fx.Node:
    """The last product, or the sum that adds a bias to it in a step of its own."""
    node, made = ends.product, ends.output
    while made.bias is None and len(node.users) == 1:
        node = next(iter(node.users))
        if (after := projection(node, facts.weights)) is None:
            return ends.product
        made = after
    return ends.product if made.bias is None else node


def _rewrite(graph: Canonical, branch: Branch, ends: Ends, owners: Mapping[fx.Node, int]) -> int:
    """Let the output projection read the branch's input; how many nodes stay because others use them."""
    ends.product.replace_input_with(ends.source, _input_like_source(graph, branch, ends))
    stamp([branch])
    erased = erase_dead(graph.graph, [ends.source, *(node for node in branch.body if not node.users)])
    left = branch.nodes - ancestors([term.node for term in branch.terms], branch.nodes)
    kept = [node for node in branch.body if node in left.difference(erased)]
    own = [node for node in kept if owners[node] == 1]
    for node in own:
        node.meta[KEPT] = branch.name  # it goes on reading the stream where it stood
    _part(graph.graph, branch, ends, own)
    return len(kept)


def _input_like_source(graph: Canonical, branch: Branch, ends: Ends) -> fx.Node:
    """What the first projections read, in the shape and dtype of what the output projection reads."""
    like = same_shape if ends.output.fan_in == ends.width else same_rows
    made = next((node for node in (*ends.read, ends.input) if like(node, ends.source)), None)
    with graph.graph.inserting_before(ends.product):
        made = shaped(graph.graph, ends.input, ends.source) if made is None else made
        wanted, known = dtype(ends.source), value(made)
        if wanted is not None and known is not None and known.dtype != wanted:
            made = graph.graph.call_method("to", (made, wanted))
            made.meta["example_value"] = known.to(wanted)
    if made in graph.overwritten:
        first = next(node for node in branch.body if made in node.all_input_nodes)
        with graph.graph.inserting_before(first):  # later it holds something else
            copied = graph.graph.call_method("clone", (made,))
        copied.meta["example_value"] = value(made)
        return copied
    return made


def _part(graph: fx.Graph, branch: Branch, ends: Ends, kept: Collection[fx.Node]) -> None:
    """Let the nodes that are ``kept`` read a norm of their own: the branch may move, and they stay."""
    copies: dict[fx.Node, fx.Node] = {}
    needed = ancestors([source for node in kept for source in node.all_input_nodes], frozenset(ends.before))
    for node in ends.before:
        if node in needed:
            with graph.inserting_before(node):
                copies[node] = graph.node_copy(node, lambda source: copies.get(source, source))
            copies[node].meta[KEPT] = branch.name
    for node in kept:
        for source in node.all_input_nodes:
            if source in copies:
                node.replace_input_with(source, copies[source])
