"""A branch: one thing that reads the residual stream and adds to it, and how it is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import fx

from fxfuse.ffn.anatomy import FFN, GateUp, mixes
from fxfuse.graph.ops import Op, op
from fxfuse.graph.paths import common_path, deeper
from fxfuse.graph.scale import ONE, Scale
from fxfuse.graph.values import called_module, clean, is_buffer, shape
from fxfuse.stream.ends import last_products
from fxfuse.stream.steps import way

Kind: TypeAlias = Literal["gated_ffn", "ffn", "attention", "linear", "moe", "other"]


@dataclass(frozen=True)
class Term:
    """One operand of a residual sum: ``scale * node``."""

    node: fx.Node
    scale: Scale = ONE


@dataclass(eq=False)
class Branch:
    """``h <- h + scale * branch(h)``.

    Attributes:
        name: the deepest module path that holds its parameters, or ``@k``, the k-th in stream order.
        kind: what it is.
        read: the node of the stream that it reads.
        terms: what it adds to the stream; one term nearly always (an adapter adds a second).
        body: its nodes, in graph order: all that depends on ``read`` and that the terms depend on.
        parameters: its weights, by graph node.
        foreign: values that it takes from elsewhere in the stream: another branch's keys, an earlier stream point.
        ffn: its anatomy, if it is a feed-forward network of a form that can be made wide.
        gate_up: the first half of it, if it is a feed-forward network of any form.
        reason: why it cannot be a part of a wide one, in words; empty if it can.
        crossing: sums of another stream that stand in its body, and that others read: its streams feed each other.
    """

    kind: Kind
    read: fx.Node
    terms: tuple[Term, ...]
    body: tuple[fx.Node, ...]
    parameters: tuple[fx.Node, ...]
    foreign: tuple[fx.Node, ...]
    ffn: FFN | None = None
    gate_up: GateUp | None = None
    reason: str = ""
    crossing: tuple[fx.Node, ...] = ()
    nodes: frozenset[fx.Node] = field(default=frozenset(), repr=False)
    name: str = ""

    @property
    def scale(self) -> Scale:
        """What its output is multiplied with on the way to the stream (as far as the sum says, for what is no FFN)."""
        return self.ffn.scale * self.terms[0].scale if self.ffn is not None else self.terms[0].scale

    def __str__(self) -> str:
        return self.name


def kind_of(body: Iterable[fx.Node], ffn: FFN | None, gate_up: GateUp | None, weight_only: Container[fx.Node]) -> Kind:
    """What a branch is, from what is in it.

    A softmax of a product of two values is an attention's; one of a product with weights may be a router's.
    """
    if ffn is not None:
        return "gated_ffn" if ffn.gated else "ffn"
    nodes = dict.fromkeys(body)
    ops = {node: found for node in nodes if (found := op(node)) is not None}
    names = {found.name for found in ops.values()}
    softmaxes = [node for node, found in ops.items() if found.name == "softmax" or _is_softmax(found)]
    products = [node for node, found in ops.items() if found.name in _PRODUCTS]
    # Before experts, because sparse attention chooses keys as a router chooses experts.
    if names & {"sdpa", "mha"} or any("attention" in _called(node).lower() for node in nodes):
        return "attention"
    scores = [node for softmax in softmaxes for node in last_products(softmax, nodes)]
    if any(node in products and _weight_of(node, weight_only) is None for node in scores):
        return "attention"
    if names & {"topk", "index_add", "one_hot", "nonzero"}:
        return "moe"
    if softmaxes and any(_routes(node, nodes, weight_only) for node in products):
        return "moe"
    if softmaxes and len(products) >= 2:
        return "attention"
    if gate_up is not None:
        return "gated_ffn" if gate_up.gated else "ffn"
    return "other"


_PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm")


def _routes(product: fx.Node, inside: Container[fx.Node], weight_only: Container[fx.Node]) -> bool:
    """Whether a product is one of experts: with several matrices of weights at once, or of tokens as they came."""
    weight = _weight_of(product, weight_only)
    if weight is not None:
        return len(shape(weight) or ()) > 2
    return any(not last_products(source, inside) for source in product.all_input_nodes)


def _weight_of(product: fx.Node, weight_only: Container[fx.Node]) -> fx.Node | None:
    """The operand of a product that depends on weights alone."""
    return next((source for source in product.all_input_nodes if source in weight_only), None)


def _is_softmax(found: Op) -> bool:
    """Whether the op is the last one of a softmax that is written out: ``exp(x) / exp(x).sum(-1)``."""
    top, bottom = found.node("input"), found.node("other")
    if found.name != "div" or top is None or bottom is None:
        return False
    one, total = op(top), op(bottom)
    return (
        one is not None
        and total is not None
        and (one.name, total.name) == ("exp", "sum")
        and total.node("input") is top
    )


def _called(node: fx.Node) -> str:
    """The name of the function or of the module's class that ``node`` calls."""
    if (module := called_module(node)) is not None:
        return type(module).__name__
    return str(getattr(node.target, "__name__", node.target)) if node.op == "call_function" else ""


def _named_parameters(
    body: Iterable[fx.Node], weights: Mapping[fx.Node, str], weight_only: set[fx.Node], tied: Container[fx.Node] = ()
) -> list[str]:
    """The names of a branch's parameters but those of its norms, in the order in which they are used.

    A norm's parameters are the vectors used before the first matrix product of the branch, or after its last. Buffers
    count only where there is no parameter, and so do weights that are ``tied``: several branches use them, under a
    name that is right for one of them at most.
    """
    nodes = list(body)
    inside = set(nodes)
    after = {node for node in nodes if mixes(node)}
    for node in nodes:
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
    before = {node for node in nodes if mixes(node)}
    for node in reversed(nodes):
        if any(user in before for user in node.users if user in inside):
            before.add(node)
    core = [node for node in nodes if node in after and node in before]
    held = parameters_of(core, weights, weight_only)
    # Tables of angles or masks often belong to the whole model.
    held = tuple(node for node in held if not is_buffer(node)) or held
    held = tuple(node for node in held if node not in tied) or held
    named = [weights[node] for node in held if weights[node]] + _held_by_modules(core)
    return named or [weights[node] for node in parameters_of(nodes, weights, weight_only) if weights[node]]


def _held_by_modules(nodes: Iterable[fx.Node]) -> list[str]:
    """The names of the parameters of modules that were not traced into."""
    called = [(str(node.target), module) for node in nodes if (module := called_module(node)) is not None]
    return [f"{clean(path)}.{name}" for path, module in called for name, _ in module.named_parameters()]


def parameters_of(
    nodes: Iterable[fx.Node], weights: Mapping[fx.Node, str], weight_only: set[fx.Node]
) -> tuple[fx.Node, ...]:
    """The weights that ``nodes`` use, in that order, through weight-only expressions such as ``w.t()`` too.

    A buffer that the graph writes to is among them.
    """
    found: dict[fx.Node, None] = {}
    sources = [source for node in nodes for source in node.all_input_nodes]
    stack = [source for source in sources if source in weight_only or source in weights][::-1]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in weights:
            found[node] = None
        else:
            stack.extend(reversed(node.all_input_nodes))
    return tuple(found)


def number_of_parameters(branch: Branch) -> int:
    """How many numbers the branch's weights hold."""
    total = 0
    for node in branch.parameters:
        count = 1
        for size in shape(node) or (0,):
            count *= size if isinstance(size, int) else 0
        total += count
    called = {str(node.target): called_module(node) for node in branch.body if node.op == "call_module"}
    return total + sum(p.numel() for module in called.values() if module is not None for p in module.parameters())


KEPT = "fxfuse_kept"
"""Key of ``node.meta`` for what stays of a dropped branch, because others use it: it is no part of theirs."""

STAMP = "fxfuse_branch"
"""Key of ``node.meta`` under which a term carries its branch's name through the passes."""


def name_branches(branches: list[Branch], weights: Mapping[fx.Node, str], weight_only: set[fx.Node]) -> None:
    """Give each branch of a graph, in stream order, a name of its own: ``@k`` where the modules' paths do not serve.

    A branch that a pass has stamped keeps its name, whatever became of its neighbours.
    """
    users = Counter(node for branch in branches for node in branch.parameters)
    tied = {node for node, count in users.items() if count > 1}
    stamped = {branch for branch in branches if any(STAMP in term.node.meta for term in branch.terms)}
    held: dict[Branch, list[str]] = {}
    for branch in branches:
        held[branch] = _named_parameters(branch.body, weights, weight_only, tied)
        stamps = [str(term.node.meta[STAMP]) for term in branch.terms if STAMP in term.node.meta]
        # What it adds may be all that another stream has become: no module is that.
        joins = any(way(term.node, weight_only)[-1] in branch.crossing for term in branch.terms)
        branch.name = "+".join(dict.fromkeys(stamps)) or ("" if joins else common_path(held[branch]))
        held[branch] = [] if joins else held[branch]
    counts = Counter(branch.name for branch in branches)
    for branch in branches:
        # A shared expert under a gate of its own, beside the routed ones: the gate is the whole mixture's by its name.
        if counts[branch.name] > 1 and branch.gate_up is not None and branch not in stamped:
            own = common_path(weights.get(each.weight, "") for each in branch.gate_up.projections)
            branch.name = own if own not in counts else branch.name
    for branch, name in deeper({branch: (branch.name, held[branch]) for branch in branches}).items():
        branch.name = name if branch not in stamped else branch.name
    counts = Counter(branch.name for branch in branches)
    for index, branch in enumerate(branches):
        if not branch.name or counts[branch.name] > 1:
            branch.name = f"@{index}"


def stamp(branches: Iterable[Branch]) -> None:
    """Write each branch's name on its terms, so that it survives a rewrite of the graph."""
    for branch in branches:
        for term in branch.terms:
            term.node.meta[STAMP] = branch.name
