"""One vocabulary for the many spellings of an op.

Dynamo says ``operator.iadd``, ``torch.add`` or the method ``add_``; torch.export says ``aten.add.Tensor``. Whoever
reads a graph asks :func:`op` and sees ``Op("add", ...)`` each time. What is not in the table has no name here
(``op`` returns None), and nothing downstream may guess what it does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import Argument, Target

from fxfuse._torch.ops import (
    BARRIERS,
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    nn_functions,
    op_name,
    overload_name,
    overloads_of,
    schema,
)
from fxfuse.graph.sharded import all_reduce, local_part


@dataclass(frozen=True, slots=True)
class Op:
    """An op by meaning: canonical name, arguments by canonical parameter name, and whether it writes its input."""

    name: str
    args: Mapping[str, Argument]
    inplace: bool = False

    def node(self, parameter: str) -> fx.Node | None:
        """The argument as a node, or None if it is absent or a constant."""
        value = self.args.get(parameter)
        return value if isinstance(value, fx.Node) else None


@dataclass(frozen=True, slots=True)
class _Spelling:
    name: str
    parameters: tuple[str, ...]
    functions: tuple[Callable[..., object], ...] = ()
    methods: tuple[str, ...] = ()
    aten: tuple[str, ...] = ()


def _row(
    name: str, parameters: str, functions: Iterable[Callable[..., object]] = (), methods: str = "", aten: str = ""
) -> _Spelling:
    return _Spelling(name, tuple(parameters.split()), tuple(functions), tuple(methods.split()), tuple(aten.split()))


_TABLE: tuple[_Spelling, ...] = (
    # arithmetic
    _row("add", "input other alpha", (operator.add, operator.iadd, torch.add), "add add_ __add__ __radd__ __iadd__", "add add_"),
    _row("sub", "input other alpha", (operator.sub, operator.isub, torch.sub, torch.subtract), "sub sub_", "sub sub_"),
    _row("mul", "input other", (operator.mul, operator.imul, torch.mul, torch.multiply), "mul mul_ multiply __mul__ __rmul__", "mul mul_"),
    _row("div", "input other", (operator.truediv, operator.itruediv, torch.div, torch.true_divide), "div div_", "div div_"),
    _row("neg", "input", (operator.neg, torch.neg), "neg", "neg"),
    _row("pow", "input exponent", (operator.pow, torch.pow), "pow pow_", "pow pow_"),
    _row("square", "input", (torch.square,), "square", "square"),
    _row("sqrt", "input", (torch.sqrt,), "sqrt", "sqrt"),
    _row("rsqrt", "input", (torch.rsqrt,), "rsqrt", "rsqrt"),
    _row("reciprocal", "input", (torch.reciprocal,), "reciprocal", "reciprocal"),
    _row("abs", "input", (torch.abs,), "abs", "abs"),
    _row("exp", "input", (torch.exp,), "exp", "exp"),
    _row("expm1", "input", (torch.expm1,), "expm1", "expm1"),
    _row("log", "input", (torch.log,), "log", "log"),
    _row("log1p", "input", (torch.log1p,), "log1p", "log1p"),
    _row("erf", "input", (torch.erf,), "erf", "erf"),
    _row("sin", "input", (torch.sin,), "sin", "sin"),
    _row("cos", "input", (torch.cos,), "cos", "cos"),
    _row("sign", "input", (torch.sign,), "sign", "sign"),
    _row("rsub", "input other alpha", (torch.rsub,), "__rsub__", "rsub"),
    _row("addcmul", "input tensor1 tensor2 value", (torch.addcmul,), "addcmul", "addcmul"),
    _row("clamp", "input min max", (torch.clamp, torch.clip), "clamp clip clamp_min clamp_max", "clamp clamp_min clamp_max"),
    _row("maximum", "input other", (torch.maximum,), "maximum", "maximum"),
    _row("minimum", "input other", (torch.minimum,), "minimum", "minimum"),
    _row("where", "condition input other", (torch.where,), "", "where"),
    _row("masked_fill", "input mask value", (torch.masked_fill,), "masked_fill masked_fill_", "masked_fill masked_fill_"),
    _row("gt", "input other", (operator.gt, torch.gt), "gt __gt__", "gt"),
    _row("ge", "input other", (operator.ge, torch.ge), "ge __ge__", "ge"),
    _row("lt", "input other", (operator.lt, torch.lt), "lt __lt__", "lt"),
    _row("le", "input other", (operator.le, torch.le), "le __le__", "le"),
    _row("mean", "input dim keepdim", (torch.mean,), "mean", "mean"),
    _row("var", "input dim", (torch.var,), "var", "var"),
    _row("std", "input dim", (torch.std,), "std", "std"),
    _row("sum", "input dim keepdim", (torch.sum,), "sum", "sum"),
    _row("amax", "input dim keepdim", (torch.amax,), "amax", "amax"),
    # activations
    _row("silu", "input", (F.silu,), "", "silu silu_"),
    _row("gelu", "input approximate", (F.gelu,), "", "gelu"),
    _row("relu", "input", (F.relu, torch.relu), "relu relu_", "relu relu_"),
    _row("relu6", "input", (F.relu6,), "", "relu6"),
    _row("leaky_relu", "input negative_slope", (F.leaky_relu,), "", "leaky_relu"),
    _row("elu", "input alpha", (F.elu,), "", "elu"),
    _row("celu", "input alpha", (F.celu, torch.celu), "", "celu"),
    _row("selu", "input", (F.selu, torch.selu), "", "selu"),
    _row("mish", "input", (F.mish,), "", "mish"),
    _row("hardswish", "input", (F.hardswish,), "", "hardswish"),
    _row("hardsigmoid", "input", (F.hardsigmoid,), "", "hardsigmoid"),
    _row("hardtanh", "input min_val max_val", (F.hardtanh,), "", "hardtanh"),
    _row("softplus", "input beta threshold", (F.softplus,), "", "softplus"),
    _row("softsign", "input", (F.softsign,), "", ""),
    _row("logsigmoid", "input", (F.logsigmoid,), "", "log_sigmoid"),
    _row("glu", "input dim", (F.glu,), "", "glu"),
    _row("sigmoid", "input", (torch.sigmoid, F.sigmoid, torch.special.expit), "sigmoid", "sigmoid"),
    _row("tanh", "input", (torch.tanh, F.tanh), "tanh", "tanh"),
    # matrix products
    _row("linear", "input weight bias", (F.linear, nn_functions.linear), "", "linear"),
    _row("matmul", "input other", (operator.matmul, torch.matmul, torch.mm), "matmul mm __matmul__", "matmul mm"),
    _row("addmm", "bias input other", (torch.addmm,), "addmm", "addmm"),
    _row("bmm", "input other", (torch.bmm,), "bmm", "bmm"),
    _row("baddbmm", "bias input other", (torch.baddbmm,), "baddbmm", "baddbmm"),
    _row("einsum", "equation operands", (torch.einsum, torch.functional.einsum), "", "einsum"),
    _row("conv", "input weight bias", (F.conv1d, F.conv2d, torch.conv1d, torch.conv2d), "", "conv1d conv2d convolution"),
    _row("embedding", "input weight", (F.embedding, torch.embedding), "", "embedding"),
    # normalisation
    _row("rms_norm", "input shape weight eps", (F.rms_norm, torch.rms_norm), "", "rms_norm"),
    _row("layer_norm", "input shape weight bias eps", (F.layer_norm, torch.layer_norm), "", "layer_norm"),
    # attention and routing
    _row("sdpa", "query key value attn_mask dropout_p is_causal", (F.scaled_dot_product_attention,), "", "scaled_dot_product_attention"),
    _row("mha", "query key value", (F.multi_head_attention_forward,)),
    _row("softmax", "input dim", (F.softmax, torch.softmax), "softmax", "softmax _softmax"),
    _row("topk", "input k dim", (torch.topk,), "topk", "topk"),
    _row("index_add", "input dim index source", (torch.index_add,), "index_add index_add_", "index_add index_add_"),
    _row("one_hot", "input num_classes", (F.one_hot,), "", "one_hot"),
    _row("nonzero", "input", (torch.nonzero,), "nonzero", "nonzero"),
    # casts, dropout and views
    _row("cast", "input dtype", (), "to type type_as", "to _to_copy type_as convert_element_type"),
    _row("contiguous", "input", (), "contiguous", "contiguous"),
    _row("clone", "input", (torch.clone,), "clone", "clone"),
    _row("detach", "input", (torch.detach,), "detach", "detach"),
    _row("dropout", "input p training inplace", (F.dropout, torch.dropout), "", "dropout"),
    _row("view", "input shape", (torch.reshape,), "view reshape view_as reshape_as", "view reshape _unsafe_view"),
    _row("flatten", "input start end", (torch.flatten,), "flatten", "flatten"),
    _row("unflatten", "input dim sizes", (torch.unflatten,), "unflatten", "unflatten"),
    _row("squeeze", "input dim", (torch.squeeze,), "squeeze", "squeeze"),
    _row("unsqueeze", "input dim", (torch.unsqueeze,), "unsqueeze", "unsqueeze"),
    _row("expand", "input", (), "expand expand_as", "expand"),
    _row("transpose", "input dim0 dim1", (torch.transpose, torch.swapaxes), "transpose swapaxes", "transpose"),
    _row("t", "input", (torch.t,), "t", "t numpy_T mT"),
    _row("permute", "input dims", (torch.permute,), "permute", "permute"),
    _row("getitem", "input index", (operator.getitem,), "__getitem__"),
    _row("slice", "input dim start end step", (), "", "slice"),
    _row("narrow", "input dim start length", (torch.narrow,), "narrow", "narrow"),
    _row("select", "input dim index", (torch.select,), "select", "select"),
    _row("chunk", "input chunks dim", (torch.chunk,), "chunk", "chunk"),
    _row("tensor_split", "input sections dim", (torch.tensor_split,), "tensor_split", "tensor_split"),
    _row("split", "input sizes dim", (torch.split, torch.functional.split), "split", "split split_with_sizes"),
    _row("unbind", "input dim", (torch.unbind,), "unbind", "unbind"),
    _row("cat", "tensors dim", (torch.cat, torch.concat), "", "cat"),
    _row("stack", "tensors dim", (torch.stack,), "", "stack"),
    # of several processes
    _row("all_reduce", "input kind group", (all_reduce,)),
    _row("local_part", "input", (local_part,)),
    _row("zeros_like", "input", (torch.zeros_like,), "new_zeros", "zeros_like"),
)  # fmt: skip

_BY_FUNCTION = {function: row for row in _TABLE for function in row.functions}
_BY_METHOD = {method: row for row in _TABLE for method in row.methods}
_BY_ATEN = {name: row for row in _TABLE for name in row.aten}

FLOATING_METHODS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in "iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem".split()
)
_INPLACE_METHODS = frozenset(f"__{function.__name__}__" for function in _INPLACE_OPERATORS)

# F.softmax, F.dropout and a few others put private parameters between those of the table.
_POSITIONS: dict[Target, tuple[str, ...]] = {
    F.softmax: ("input", "dim"),
    torch.embedding: ("weight", "input"),
    torch.ops.aten.embedding.default: ("weight", "input"),
    torch.ops.aten.dropout.default: ("input", "p", "training"),
    torch.dropout: ("input", "p", "training"),
    torch.ops.aten._to_copy.default: ("input",),
    torch.ops.aten.view_as_real.default: ("input",),
}

POINTWISE = frozenset(
    "add sub rsub mul div neg pow square sqrt rsqrt reciprocal abs exp expm1 log log1p erf sin cos sign addcmul clamp "
    "maximum minimum where masked_fill gt ge lt le silu gelu relu relu6 leaky_relu elu celu selu mish hardswish hardsigmoid "
    "hardtanh softplus softsign logsigmoid sigmoid tanh cast clone contiguous dropout".split()
)
"""Ops whose value at a place depends on their inputs at that place alone."""

OVER_UNITS = frozenset("mean var std sum amax softmax".split())
"""Ops over a dimension: over the last one they mix the features of a token and no two tokens."""

MATMUL = frozenset("linear matmul addmm bmm baddbmm einsum conv sdpa mha".split())
"""Ops that mix the features of a token (or tokens): what a norm never contains."""

VIEWS = frozenset(
    "view flatten unflatten squeeze unsqueeze expand transpose t permute getitem slice narrow select chunk split tensor_split unbind "
    "local_part "
    "cast contiguous detach dropout".split()
)
"""Ops whose output may share memory with their input."""


T = TypeVar("T")


def _remembered(key: str, function: Callable[[fx.Node], T]) -> Callable[[fx.Node], T]:
    """``function``, its answer kept on the node for as long as the target and the arguments are the same objects.

    torch.fx makes new ones of arguments that change. Most questions about a graph are asked of each node many times.
    """

    def ask(node: fx.Node) -> T:
        target, args, kwargs = node.target, node.args, node.kwargs
        held: tuple[object, object, object, T] | None = node.__dict__.get(key)
        if held is not None and held[0] is args and held[1] is kwargs and held[2] is target:
            return held[3]
        answer = function(node)
        node.__dict__[key] = (args, kwargs, target, answer)
        return answer

    return ask


def op(node: fx.Node) -> Op | None:
    """What ``node`` computes, in the vocabulary of this module, or None if the table does not know it."""
    if node.op not in ("call_function", "call_method"):
        return None
    # What these compute depends on more than their arguments: on the values that the nodes are known to have.
    return _op(node) if node.target in _OF_TWO or _may_cast(node.target) else _known_op(node)


@cache
def _may_cast(target: Target) -> bool:
    row, _ = _row_of(target)
    return row is not None and row.name == "cast"


def _op(node: fx.Node) -> Op | None:
    target = node.target
    if target is getattr:
        return Op("t", {"input": node.args[0]}) if node.args[1] in ("T", "mT") else None
    if target in _OF_TWO:
        return Op(_OF_TWO[target], dict(zip(("input", "other"), node.args, strict=True))) if _is_of_two(node) else None
    row, names = _row_of(target)
    if row is None:
        return _nameless(node)
    args: dict[str, Argument] = dict(zip(names, node.args, strict=False))
    # What the table has no name for still tells two calls apart: aten.elu takes scales that F.elu does not.
    args.update((f"argument {i}", node.args[i]) for i in range(len(names), len(node.args)))
    for key, value in node.kwargs.items():
        args[_ALIASES.get(key, key)] = value
    if row.name == "cast":
        return _cast(node, args)
    if row.name in ("view", "expand", "permute") and len(node.args) > 2:
        args = {"input": node.args[0], "dims" if row.name == "permute" else "shape": tuple(node.args[1:])}
    elif target in ("clamp_max", torch.ops.aten.clamp_max.default) and len(node.args) > 1:
        args = {"input": node.args[0], "max": node.args[1]}
    elif (row.name == "where" and len(args) != 3) or isinstance(args.get("shape"), torch.dtype):
        return None  # the places where a condition holds, the bits of a value: other ops of these names
    return Op(row.name, args, bool(mutated_arguments(node)))


_known_op = _remembered("fxfuse_op", _op)


def _nameless(node: fx.Node) -> Op | None:
    """An op that the table has no name for, if PyTorch says of it that it acts on each place alone: ``atan(x)``."""
    overload = _pointwise_overload(node.target)
    if overload is None or node.kwargs or mutated_arguments(node):
        return None
    parameters = [argument.name for argument in schema(overload).arguments]
    if len(node.args) > len(parameters) or not isinstance(node.args[0], fx.Node):
        return None
    return Op(_POINTWISE + op_name(overload), dict(zip(("input", *parameters[1:]), node.args, strict=False)))


@cache
def _pointwise_overload(target: Target) -> OpOverload | None:
    """The aten overload that an op is or is named after, if all of its name are pointwise, draw nothing, return no view."""
    packet: object
    if isinstance(target, OpOverload):
        packet = target.overloadpacket
        if schema(target).name.partition("::")[0] != "aten":
            return None
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        module = "" if isinstance(target, str) else str(getattr(target, "__module__", ""))
        if module not in ("", "None", "torch", "torch.nn.functional", "torch._C._nn") or name.startswith("_"):
            return None
        packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, OpOverloadPacket):
        return None
    overloads = [
        overload
        for overload in overloads_of(packet)
        if "out" not in overload_name(overload) and _takes_a_tensor(overload)
    ]
    pure = all(
        torch.Tag.pointwise in overload.tags
        and torch.Tag.nondeterministic_seeded not in overload.tags
        and all(result.alias_info is None or result.alias_info.is_write for result in schema(overload).returns)
        for overload in overloads
    )
    return (target if isinstance(target, OpOverload) else overloads[0]) if overloads and pure else None


def _takes_a_tensor(overload: OpOverload) -> bool:
    arguments = schema(overload).arguments
    return bool(arguments) and isinstance(arguments[0].type, torch.TensorType)


_POINTWISE = "pointwise "


def is_pointwise(call: Op) -> bool:
    """Whether its value at a place depends on its inputs at that place alone."""
    return call.name in POINTWISE or call.name.startswith(_POINTWISE)


_OF_TWO: dict[Target, str] = {
    torch.min: "minimum", "min": "minimum", torch.ops.aten.min.other: "minimum",
    torch.max: "maximum", "max": "maximum", torch.ops.aten.max.other: "maximum",
}  # fmt: skip
"""What torch.min and torch.max are between two tensors; over a dimension they are other ops."""


def _is_of_two(node: fx.Node) -> bool:
    other = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    if not isinstance(other, fx.Node):
        return False
    made = (other.meta.get(key) for key in ("example_value", "val"))
    return other.op == "get_attr" or any(isinstance(value, torch.Tensor) for value in made)


_ALIASES = {"self": "input", "normalized_shape": "shape", "split_size_or_sections": "sizes"}


@cache
def _row_of(target: Target) -> tuple[_Spelling | None, tuple[str, ...]]:
    """The row of the table for a target, and the names of its positional arguments."""
    row: _Spelling | None
    if isinstance(target, OpOverload):
        namespace, _, name = schema(target).name.partition("::")
        row = _BY_ATEN.get(name) if namespace == "aten" or name == "convert_element_type" else None
    elif isinstance(target, str):
        row = _BY_METHOD["to"] if target in FLOATING_METHODS else _BY_METHOD.get(target)
    else:
        row = _BY_FUNCTION.get(target)
    return row, _POSITIONS.get(target, row.parameters if row is not None else ())


def _cast(node: fx.Node, args: dict[str, Argument]) -> Op | None:
    """``to`` takes a dtype, a device, a tensor or several of them; only those that set the dtype alone are casts."""
    if node.target in FLOATING_METHODS:
        return Op("cast", {"input": node.args[0], "dtype": FLOATING_METHODS[str(node.target)]})
    if node.target in ("type_as", torch.ops.aten.type_as.default) or _takes_a_dtype(node):
        made = node.meta.get("example_value", node.meta.get("val"))
        return Op("cast", {"input": args["input"], "dtype": made.dtype}) if made is not None else None
    rest = [*node.args[1:], *(v for k, v in node.kwargs.items() if k in ("dtype", "device", "other"))]
    dtypes = [value for value in rest if isinstance(value, torch.dtype)]
    foreign = [value for value in rest if isinstance(value, str | torch.device | fx.Node)]
    if len(dtypes) != 1 or foreign:
        return None
    return Op("cast", {"input": args["input"], "dtype": dtypes[0]})


def _takes_a_dtype(node: fx.Node) -> bool:
    """Whether ``node`` is ``x.to(y.dtype)`` as symbolic_trace writes it: with the attribute as a node."""
    given = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    return isinstance(given, fx.Node) and given.target is getattr and given.args[1] == "dtype"


@cache
def _writes_first(target: Target) -> bool:
    """Whether a function (not an aten overload) or a method writes its first argument, by its name."""
    if isinstance(target, str):
        return (target.endswith("_") and not target.endswith("__")) or target in _INPLACE_METHODS
    if target in _INPLACE_OPERATORS:
        return True
    name = getattr(target, "__name__", "")
    named = name.endswith("_") and not name.endswith("__")
    return named and getattr(target, "__module__", "") != operator.and_.__module__  # which has and_, or_ and not_


@cache
def inplace_position(target: Target) -> int | None:
    """Where a function of torch.nn.functional takes its ``inplace``, which modules pass by position."""
    code = getattr(target, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    return names.index("inplace") if "inplace" in names else None


def asks_for_inplace(node: fx.Node) -> bool:
    """Whether ``node`` is a function of torch.nn.functional that is told to write its input."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is True
    position = inplace_position(node.target)
    return position is not None and position < len(node.args) and node.args[position] is True


@cache
def _written_parameters(target: OpOverload | OpOverloadPacket) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that an overload writes; of a packet, what any of its overloads writes."""
    overloads = [target] if isinstance(target, OpOverload) else overloads_of(target)
    written = {
        (i, a.name)
        for overload in overloads
        for i, a in enumerate(schema(overload).arguments)
        if a.alias_info is not None and a.alias_info.is_write
    }
    return tuple(sorted(written))


def mutated_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs that ``node`` writes to, by every convention that a traced graph uses for it."""
    return _known_mutated_arguments(node) if node.op in ("call_function", "call_method") else ()


def _mutated_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    target = node.target
    written: list[Argument] = []
    if isinstance(target, HigherOrderOperator):
        if "mutation" in str(target):  # a Triton kernel of the model's own, which tells not what it writes
            written.extend(node.all_input_nodes)
    elif isinstance(target, OpOverload | OpOverloadPacket):
        for index, name in _written_parameters(target):
            written.append(node.args[index] if index < len(node.args) else node.kwargs.get(name))
    elif "out" in node.kwargs:
        written.append(node.kwargs["out"])
    elif _writes_first(target) or asks_for_inplace(node):
        written.append(node.args[0] if node.args else node.kwargs.get("input"))
    if not written:
        return ()
    flat: list[fx.Node] = []
    fx.node.map_arg(written, flat.append)
    return tuple(flat)


_known_mutated_arguments = _remembered("fxfuse_mutated_arguments", _mutated_arguments)


def drops_randomly(call: Op) -> bool:
    """Whether a dropout is live: in eval mode, or with p = 0, it is the identity."""
    if call.name != "dropout" or call.args.get("training", True) is False:
        return False
    return call.args.get("p", 0.5) not in (0, 0.0)


def is_random(node: fx.Node) -> bool:
    """Whether two runs of ``node`` on the same values may differ."""
    call = op(node)
    if call is not None:
        return drops_randomly(call) or (call.name == "sdpa" and call.args.get("dropout_p", 0) not in (0, 0.0))
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return True
    name = getattr(node.target, "__name__", str(node.target))
    return any(word in name for word in ("rand", "dropout", "bernoulli", "multinomial", "normal_", "uniform"))


def is_barrier(node: fx.Node) -> bool:
    """A node that changes what the ops after it mean: borders of autocast, grad mode, vmap. Nothing moves across one."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in BARRIERS


def is_impure(node: fx.Node) -> bool:
    """Whether erasing ``node``, though nobody uses it, would change what the graph does.

    Random numbers that nobody reads are nothing that it does: torch.fx counts attention, which may drop out, as random.
    """
    return node.op in ("placeholder", "output") or bool(mutated_arguments(node)) or node.is_impure(impure_random=False)
