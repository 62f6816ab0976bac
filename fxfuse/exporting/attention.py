"""An attention of a graph as a Llama's: queries, keys and values of one norm, rotary angles, grouped heads."""

from __future__ import annotations

from torch import fx

from fxfuse.errors import ExportError
from fxfuse.exporting.layout import Attention, LinearAttention
from fxfuse.exporting.reading import behind, contribution_of, norm_of
from fxfuse.exporting.stream import Planned
from fxfuse.exporting.weights import Expressions, Weight
from fxfuse.graph.ops import op
from fxfuse.graph.values import dtype, shape, sizes_only
from fxfuse.packing.expressions import ONE
from fxfuse.passes.linear import Facts, fitting_ends
from fxfuse.stream.branch import Branch
from fxfuse.stream.ends import last_products

_NORMS = frozenset({"rms_norm", "layer_norm", "rsqrt", "mean", "pow", "norm"})


def attention_of(branch: Branch, planned: Planned, write: Expressions) -> tuple[Attention, float]:
    """The attention, and the eps of its norm.

    Raises:
        ExportError: it is none of a Llama's.
    """
    name, end = branch.name, contribution_of(branch, planned)
    scores = last_products(end.output.input, branch.nodes)
    call = op(scores[0]) if len(scores) == 1 else None
    if call is None or call.name != "sdpa":
        raise ExportError(
            f"what {name!r} projects at last is not one scaled_dot_product_attention: load the model with "
            "attn_implementation='sdpa'; an attention with a gate or a norm on its output is no Llama's"
        )
    query, key, value = call.node("query"), call.node("key"), call.node("value")
    assert query is not None and key is not None and value is not None
    q, k, v = (behind(node, branch, planned, what) for node, what in
               ((query, "queries"), (key, "keys"), (value, "values")))  # fmt: skip
    for each, what in ((q, "queries"), (k, "keys"), (v, "values")):
        if each.through & _NORMS:
            raise ExportError(f"the {what} of {name!r} are normalised (QK-norm), and a Llama's are not")
    if not {"cat", "neg"} <= q.through or not {"cat", "neg"} <= k.through:
        raise ExportError(f"queries and keys of {name!r} are not turned by rotary angles as a Llama's are")
    if len({q.projection.input, k.projection.input, v.projection.input}) != 1:
        raise ExportError(f"queries, keys and values of {name!r} are projections of different values")
    heads, head_dim = _heads(query, name)
    kv_heads = k.projection.width // head_dim
    sizes = (q.projection.width, k.projection.width, v.projection.width, end.output.fan_in)
    if sizes != (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, heads * head_dim):
        raise ExportError(f"{name!r} has heads of different sizes for queries, keys and values")
    norm = norm_of(q.projection.input, q.projection.fan_in, branch.read, planned, repr(name))
    wanted = head_dim**-0.5
    scale = scores[0].kwargs.get("scale")
    turn = 1.0 if scale is None else _number(scale, name) / wanted
    turn = 1.0 if abs(turn - 1.0) < 1e-12 else turn
    given = dtype(q.projection.weight)
    assert given is not None
    made = Attention(
        name,
        write.gain(norm.factor, q.projection.fan_in, given),
        write.rows(q.projection).times(turn),
        write.rows(k.projection),
        write.rows(v.projection),
        write.rows(end.output, ONE, end.gains).times(end.number),
        _times(write.bias(q.projection), turn),
        write.bias(k.projection),
        write.bias(v.projection),
        _times(write.bias(end.output, (), end.gains), end.number),
        heads,
        kv_heads,
        head_dim,
    )
    return made, norm.eps


def linear_of(branch: Branch, planned: Planned, write: Expressions) -> tuple[LinearAttention, float]:
    """The linear map that is, or takes, the place of an attention; and the eps of its norm.

    Raises:
        ExportError: it is none of its norm's output.
        PlanError: its output projection does not fit.
    """
    end = contribution_of(branch, planned)
    reads: fx.Node = end.output.input
    if branch.kind != "linear":
        facts = Facts(planned.weights, sizes_only(planned.gm.graph))
        reads = fitting_ends(branch, planned.stream, facts).input
    norm = norm_of(reads, end.output.fan_in, branch.read, planned, repr(branch.name))
    given = dtype(end.output.weight)
    assert given is not None
    made = LinearAttention(
        branch.name,
        write.gain(norm.factor, end.output.fan_in, given),
        write.rows(end.output, ONE, end.gains).times(end.number),
        _times(write.bias(end.output, (), end.gains), end.number),
    )
    return made, norm.eps


def _heads(query: fx.Node, name: str) -> tuple[int, int]:
    sizes = shape(query)
    if sizes is None or len(sizes) != 4 or not isinstance(sizes[1], int) or not isinstance(sizes[3], int):
        raise ExportError(f"the graph does not tell how many heads {name!r} has")
    return sizes[1], sizes[3]


def _number(scale: object, name: str) -> float:
    if not isinstance(scale, int | float):
        raise ExportError(f"the scores of {name!r} are scaled with something that is no number")
    return float(scale)


def _times(weight: Weight | None, number: float) -> Weight | None:
    return None if weight is None else weight.times(number)
