"""Reading parts of a planned graph: norms, what multiplies a contribution, and the projection behind a value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxfuse.errors import ExportError
from fxfuse.exporting.stream import Planned
from fxfuse.exporting.weights import Expressions
from fxfuse.ffn.affine import Factor, normed
from fxfuse.ffn.projection import Projection, projection
from fxfuse.ffn.rms import rms
from fxfuse.graph.ops import op
from fxfuse.graph.peel import PASSED, Change, layers, peel
from fxfuse.graph.values import dtype, sizes_only
from fxfuse.passes.linear import Facts, fitting_ends
from fxfuse.stream.branch import Branch
from fxfuse.stream.ends import last_products


@dataclass(frozen=True)
class Norm:
    """An RMS norm of the stream: what its output is multiplied with, and its eps."""

    factor: Factor
    eps: float


def norm_of(read: fx.Node, width: int, point: fx.Node, planned: Planned, who: str) -> Norm:
    """The norm through which ``read`` is computed from a point of the stream.

    Raises:
        ExportError: it is no RMS norm of that point; ``who`` is named.
    """
    affine = normed(read, width, planned.weights, lambda node: node not in planned.stream.levels)
    found = rms(affine)
    if found is None:
        raise ExportError(f"{who} reads the stream through something else than an RMS norm, which a Llama has")
    if affine.shifts:
        raise ExportError(f"the norm of {who} adds something, and a Llama's only multiplies")
    source, eps = found
    casts = PASSED | Change.ROUND  # a norm that computes in float32 rounds a stream of float64, as Llama's does
    if peel(source, casts) is not peel(point, casts):
        raise ExportError(f"{who} does not read the stream itself but {source.name}")
    return Norm(affine.factor, eps)


@dataclass(frozen=True)
class Contribution:
    """What a branch adds: ``number * gains * output``, a projection's output."""

    output: Projection
    gains: tuple[fx.Node, ...]
    number: float


def contribution_of(branch: Branch, planned: Planned) -> Contribution:
    """The projection that a branch ends in, and what multiplies it on the way to the stream.

    Raises:
        ExportError: something else comes after its last projection, or it has several terms.
    """
    if len(branch.terms) != 1 or branch.terms[0].scale.nodes:
        raise ExportError(f"{branch.name!r} adds several values to the stream, or a value times a symbolic number")
    term = branch.terms[0]
    node, number, gains = term.node, term.scale.number, list[fx.Node]()
    allow = PASSED | Change.NUMBER | Change.GAIN
    for taken in layers(term.node, allow, planned.weights, read=dtype(term.node)):
        node, number = taken.source, number * taken.scale.number
        if taken.scale.nodes:
            raise ExportError(f"{branch.name!r} is multiplied with a symbolic number: trace it without dynamic=True")
        if taken.weight is not None:
            gains.append(taken.weight)
    output = projection(node, planned.weights)
    if output is None or output.rows is not None:
        raise ExportError(
            f"{branch.name!r} does not end in one linear projection but in {node.name}: a norm after it (sandwich or "
            "post-norm), say, which Llama's formats cannot express; the format 'transformers' can"
        )
    return Contribution(output, tuple(gains), number)


def linear_map_of(branch: Branch, planned: Planned) -> Projection:
    """The one linear map that an attention becomes, or is already: its output projection, square.

    Raises:
        PlanError: the projection reads another number of features than the attention.
        ExportError: it cannot be told.
    """
    if branch.kind != "linear":
        facts = Facts(planned.weights, sizes_only(planned.gm.graph))
        return fitting_ends(branch, planned.stream, facts).output
    last = last_products(branch.terms[0].node, branch.nodes)
    output = projection(last[0], planned.weights) if len(last) == 1 else None
    if output is None or output.rows is not None:
        raise ExportError(f"{branch.name!r} is no linear map that is one projection")
    return output


@dataclass(frozen=True)
class Behind:
    """The one projection that a value is computed from, and the names of the ops in between."""

    projection: Projection
    through: frozenset[str]


def behind(node: fx.Node, branch: Branch, planned: Planned, what: str) -> Behind:
    """The projection that ``node`` comes from with no other one in between.

    Raises:
        ExportError: there are none, or several.
    """
    found: dict[fx.Node, Projection] = {}
    through: set[str] = set()
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        leaf = projection(current, planned.weights)
        if leaf is not None:
            found[current] = leaf
            continue
        call = op(current)
        through.add(call.name if call is not None else str(getattr(current.target, "__name__", current.target)))
        new = [source for source in current.all_input_nodes if source in branch.nodes and source not in seen]
        seen.update(new)
        stack.extend(new)
    if len(found) != 1:
        raise ExportError(f"the {what} of {branch.name!r} come from {len(found)} projections, and a Llama's from one")
    return Behind(next(iter(found.values())), frozenset(through))


def one_number(node: fx.Node, write: Expressions, what: str) -> float:
    """A weight that is one number.

    Raises:
        ExportError: it is more.
    """
    held = write.of(node)()
    if held.numel() != 1:
        raise ExportError(f"{what} is multiplied with a weight for each feature, which a Llama has not")
    return float(held)
