"""Why two FFNs that read one point of the stream compute with different values: the first thing that sets them apart.

Their inputs are walked backwards side by side, until a number, an op or a weight is another one.
"""

from __future__ import annotations

from torch import fx

from fxfuse.ffn.affine import NORMS, Normed
from fxfuse.ffn.rms import rms
from fxfuse.graph.ops import Op, op
from fxfuse.graph.value_numbering import Numbering
from fxfuse.graph.values import WEIGHT, module_path
from fxfuse.graph.written import written_by
from fxfuse.stream.branch import Branch


def unlike(branch: Branch, other: Branch, numbering: Numbering) -> str:
    """Why the input of ``branch``, gain and shift taken off, is not that of ``other``, in words."""
    assert branch.ffn is not None and other.ffn is not None
    own, others = branch.ffn.normed, other.ffn.normed
    kinds = _kind(own, branch), _kind(others, other)
    if kinds[0] != kinds[1]:
        return f"it reads {kinds[0]}, and {other.name} reads {kinds[1]}"
    norms = rms(own), rms(others)
    if norms[0] is not None and norms[1] is not None and norms[0][1] != norms[1][1]:
        return _eps(norms[0][1], norms[1][1], other)
    return _first(own.bare, others.bare, branch, other, numbering)


def _kind(normed: Normed, branch: Branch) -> str:
    """What is left of a norm without gain and shift, by name."""
    call = op(normed.bare)
    if normed.bare is branch.read:
        return "the stream without a norm"
    if call is not None and call.name in NORMS:
        return f"a {call.name}"
    if rms(normed) is not None:
        return "an rms_norm written out"
    return _called(normed.bare) if call is None else call.name


def _eps(own: object, others: object, other: Branch) -> str:
    return f"its norm has eps={own}, and that of {other.name} eps={others}"


def _first(one: fx.Node, two: fx.Node, branch: Branch, other: Branch, numbering: Numbering) -> str:
    """The first difference between two values."""
    seen: set[tuple[fx.Node, fx.Node]] = set()
    stack = [(one, two)]
    while stack:
        pair = stack.pop()
        if pair in seen or numbering[pair[0]] == numbering[pair[1]]:
            continue
        seen.add(pair)
        if pair[0] in branch.parameters and pair[1] in other.parameters:
            return (
                f"it reads {_kind_of_value(one)} with a weight of its own inside ({_weight(pair[0])}), which cannot be "
                f"folded into its projections as a gain can, so it cannot be wide with {other.name}"
            )
        calls = op(pair[0]), op(pair[1])
        if calls[0] is None and calls[1] is None:
            unknown = f"it reads {_name(pair[0])} where {other.name} reads {_name(pair[1])}"
            return f"{unknown}, and what {_called(pair[0])} does with them is not known"
        if calls[0] is None or calls[1] is None or calls[0].name != calls[1].name:
            return f"it reads {_name(pair[0])} where {other.name} reads {_name(pair[1])}"
        nodes: list[tuple[fx.Node, fx.Node]] = []
        for key in dict.fromkeys([*calls[0].args, *calls[1].args]):
            if pair == (one, two) and calls[0].name in NORMS and key in ("weight", "bias"):
                continue
            values = calls[0].args.get(key), calls[1].args.get(key)
            if isinstance(values[0], fx.Node) and isinstance(values[1], fx.Node):
                nodes.append((values[0], values[1]))
            elif repr(values[0]) != repr(values[1]):
                if key == "eps":
                    return _eps(*values, other)
                return f"it reads {_name(pair[0])} with {key}={values[0]}, and {other.name} with {key}={values[1]}"
        stack.extend(reversed(_paired(nodes, calls[0], numbering)))
    return f"it reads another value than {other.name}: {_name(one)}, and not {_name(two)}"


def _paired(nodes: list[tuple[fx.Node, fx.Node]], call: Op, numbering: Numbering) -> list[tuple[fx.Node, fx.Node]]:
    """The operands of two ops pair by pair; those of a product or a sum as they match best."""
    if call.name in ("add", "mul") and len(nodes) == 2:
        (a, b), (c, d) = nodes
        if numbering[a] == numbering[d] or numbering[c] == numbering[b]:
            return [(a, d), (c, b)]
    return nodes


def _kind_of_value(node: fx.Node) -> str:
    call = op(node)
    return f"a {call.name}" if call is not None and call.name in NORMS else _name(node)


def _called(node: fx.Node) -> str:
    """What an op without a meaning is called: a module's path, or a function's name."""
    return "a value that is edited in place" if written_by(node) else str(getattr(node.target, "__name__", node.target))


def _name(node: fx.Node) -> str:
    call = op(node)
    if (write := written_by(node)) is not None:
        return f"what {write.name} edited in place"
    return node.name if call is None else f"{call.name} ({node.name})"


def _weight(node: fx.Node) -> str:
    return str(node.meta.get(WEIGHT) or module_path(node) or node.target)
