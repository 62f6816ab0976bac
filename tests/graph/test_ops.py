"""One name for each op, however it is spelled; what it writes, and what it must never be taken for."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.library import custom_op
from torch.nn import functional as F

from fxfuse.graph.ops import Op, drops_randomly, is_barrier, is_impure, is_pointwise, mutated_arguments, op
from tests.models.blocks import on_every_road, trace, vectors

aten = torch.ops.aten


def call(target: Callable[..., object] | str, *args: object, **kwargs: object) -> fx.Node:
    """A node that calls a function, or a method by its name; ``"x"`` and ``"y"`` among the arguments are inputs."""
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in ("x", "y", "z")}
    args = tuple(inputs.get(a, a) if isinstance(a, str) else a for a in args)
    kwargs = {k: inputs.get(a, a) if isinstance(a, str) else a for k, a in kwargs.items()}
    if isinstance(target, str):
        return graph.call_method(target, args, kwargs)
    return graph.call_function(target, args, kwargs)


def meaning(node: fx.Node) -> tuple[str, dict[str, object]]:
    found = op(node)
    assert found is not None
    return found.name, {k: v.name if isinstance(v, fx.Node) else v for k, v in found.args.items()}


X, XY = {"input": "x"}, {"input": "x", "other": "y"}
ADD = [
    call(operator.add, "x", "y"),
    call(torch.add, "x", "y"),
    call(torch.add, input="x", other="y"),
    call("add", "x", "y"),
    call("__add__", "x", "y"),
    call(aten.add.Tensor, "x", "y"),
    call(aten.add_.Tensor, "x", "y"),
    call(operator.iadd, "x", "y"),
    call("add_", "x", "y"),
    call("__iadd__", "x", "y"),
]
SPELLINGS: list[tuple[list[fx.Node], str, dict[str, object]]] = [
    (ADD, "add", XY),
    ([call(torch.sub, "x", "y"), call(operator.sub, "x", "y"), call("sub_", "x", "y")], "sub", XY),
    ([call(torch.add, "x", "y", alpha=2), call(aten.add.Tensor, "x", "y", alpha=2)], "add", {**XY, "alpha": 2}),
    ([call(operator.mul, "x", 3), call(torch.mul, "x", 3), call("mul", "x", 3), call(aten.mul.Tensor, "x", 3)],
     "mul", {"input": "x", "other": 3}),
    ([call(operator.truediv, "x", "y"), call("div", "x", "y"), call(aten.div.Tensor, "x", "y")], "div", XY),
    ([call(operator.pow, "x", 2), call("pow", "x", 2), call(aten.pow.Tensor_Scalar, "x", 2)],
     "pow", {"input": "x", "exponent": 2}),
    ([call(F.silu, "x"), call(aten.silu.default, "x"), call(aten.silu_.default, "x")], "silu", X),
    ([call(F.gelu, "x", approximate="tanh"), call(aten.gelu.default, "x", approximate="tanh")],
     "gelu", {"input": "x", "approximate": "tanh"}),
    ([call(torch.relu, "x"), call("relu", "x"), call("relu_", "x"), call(aten.relu.default, "x")], "relu", X),
    ([call(F.linear, "x", "y"), call(torch._C._nn.linear, "x", "y"), call(aten.linear.default, "x", "y")],
     "linear", {"input": "x", "weight": "y"}),
    ([call(operator.matmul, "x", "y"), call("matmul", "x", "y"), call(torch.mm, "x", "y"),
      call("__matmul__", "x", "y"), call(aten.mm.default, "x", "y")],
     "matmul", XY),
    ([call(torch.addmm, "x", "y", "z"), call(aten.addmm.default, "x", "y", "z")],
     "addmm", {"bias": "x", "input": "y", "other": "z"}),
    ([call(F.rms_norm, "x", (8,), "y", 1e-5), call(aten.rms_norm.default, "x", [8], "y", 1e-5)],
     "rms_norm", {"input": "x", "shape": (8,), "weight": "y", "eps": 1e-5}),
    ([call(F.layer_norm, "x", (8,), weight="y"), call(torch.layer_norm, "x", normalized_shape=(8,), weight="y")],
     "layer_norm", {"input": "x", "shape": (8,), "weight": "y"}),
    ([call(F.softmax, "x", -1, 3), call(torch.softmax, "x", -1), call("softmax", "x", dim=-1)],
     "softmax", {"input": "x", "dim": -1}),
    ([call(F.dropout, "x", 0.1, False), call(torch.dropout, "x", 0.1, False),
      call(aten.dropout.default, "x", 0.1, False), call(F.dropout, "x", p=0.1, training=False)],
     "dropout", {"input": "x", "p": 0.1, "training": False}),
    ([call(F.embedding, "x", "y"), call(torch.embedding, "y", "x"), call(aten.embedding.default, "y", "x")],
     "embedding", {"input": "x", "weight": "y"}),
    ([call(torch.chunk, "x", 2, -1), call("chunk", "x", 2, dim=-1), call(aten.chunk.default, "x", 2, -1)],
     "chunk", {"input": "x", "chunks": 2, "dim": -1}),
    ([call(torch.split, "x", 4, dim=-1), call("split", "x", 4, dim=-1), call(aten.split.Tensor, "x", 4, -1),
      call(torch.split, "x", split_size_or_sections=4, dim=-1)],
     "split", {"input": "x", "sizes": 4, "dim": -1}),
    ([call(torch.tensor_split, "x", 2, -1), call("tensor_split", "x", 2, dim=-1)],
     "tensor_split", {"input": "x", "sections": 2, "dim": -1}),
    ([call("view", "x", 2, 8), call("reshape", "x", (2, 8)), call(aten.view.default, "x", (2, 8))],
     "view", {"input": "x", "shape": (2, 8)}),
    ([call("to", "x", torch.float32), call("float", "x"), call("type", "x", torch.float32),
      call(aten.to.dtype, "x", torch.float32), call("to", "x", dtype=torch.float32),
      call(aten._to_copy.default, "x", dtype=torch.float32)],
     "cast", {"input": "x", "dtype": torch.float32}),
    ([call("clamp_min", "x", 0)], "clamp", {"input": "x", "min": 0}),
    ([call("clamp_max", "x", 0), call(aten.clamp_max.default, "x", 0), call("clamp_max", "x", max=0)],
     "clamp", {"input": "x", "max": 0}),
    ([call(torch.where, "x", "y", "z"), call(aten.where.self, "x", "y", "z")],
     "where", {"condition": "x", "input": "y", "other": "z"}),
    ([call(torch.masked_fill, "x", "y", 0.0), call("masked_fill", "x", "y", 0.0), call("masked_fill_", "x", "y", 0.0),
      call(aten.masked_fill.Scalar, "x", "y", 0.0)],
     "masked_fill", {"input": "x", "mask": "y", "value": 0.0}),
    ([call(torch.stack, ["x"], 0), call(torch.stack, ["x"], dim=0), call(aten.stack.default, ["x"], 0)],
     "stack", {"dim": 0}),
    ([call(operator.gt, "x", 0), call("gt", "x", 0), call(aten.gt.Scalar, "x", 0)], "gt", {"input": "x", "other": 0}),
    ([call(torch.t, "x"), call("t", "x"), call(getattr, "x", "T"), call(aten.t.default, "x")], "t", X),
    ([call("permute", "x", 1, 0), call(torch.permute, "x", (1, 0))], "permute", {"input": "x", "dims": (1, 0)}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "name", "args"), SPELLINGS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_spelling_has_one_name_and_one_set_of_arguments(
    nodes: list[fx.Node], name: str, args: dict[str, object]
) -> None:
    for node in nodes:
        found, given = meaning(node)
        assert found == name, node.format_node()
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in args}
        assert known == args, node.format_node()


class ManyOps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.linear(self.norm(x)).chunk(2, dim=-1)
        c = F.silu(a) * b + a
        c = torch.cat((c, F.dropout(b, 0.1, self.training)), -1)
        c = c.reshape(-1, 8).unsqueeze(0).squeeze(0)
        c = torch.softmax(c.view(x.shape), dim=-1) @ torch.eye(8, dtype=x.dtype)
        return c * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@on_every_road
def test_a_model_speaks_the_vocabulary_on_every_road(road: str) -> None:
    traced = trace(ManyOps().double().eval(), vectors(), road=road)

    names = [found.name for node in traced.gm.graph.nodes if (found := op(node)) is not None]

    expected = "layer_norm linear chunk getitem getitem silu mul add dropout cat view unsqueeze squeeze view softmax"
    assert names == [*expected.split(), "matmul", "pow", "mean", "add", "rsqrt", "mul"]


@pytest.mark.parametrize(
    "node",
    [
        call(torch.where, "x"),
        call("masked_scatter", "x", "y", "z"),
        call("view", "x", torch.int64),
        call("to", "x", "cuda"),
        call("to", "x", torch.device("cpu"), torch.float32),
        call("to", "x", "y"),
        call(torch.prelu, "x", "y"),
        call("no_such_method", "x"),
        call(getattr, "x", "shape"),
        fx.Graph().placeholder("x"),
    ],
    ids=lambda node: str(getattr(node.target, "__name__", node.target)),
)
def test_what_the_table_does_not_know_has_no_name(node: fx.Node) -> None:
    assert op(node) is None


@custom_op("fxfuse_tests::bump", mutates_args={"y"})
def bump(x: Tensor, y: Tensor) -> None:
    y.add_(x)


WRITES = {
    "add_": (call("add_", "x", "y"), "x"),
    "h += f": (call(operator.iadd, "x", "y"), "x"),
    "h -= f": (call(operator.isub, "x", "y"), "x"),
    "h **= 2": (call(operator.ipow, "x", 2), "x"),
    "mask &= other": (call(operator.iand, "x", "y"), "x"),
    "mask |= other": (call(operator.ior, "x", "y"), "x"),
    "h[0] = f": (call(operator.setitem, "x", 0, "y"), "x"),
    "__setitem__": (call("__setitem__", "x", 0, "y"), "x"),
    "out=": (call(torch.add, "x", "y", out="z"), "z"),
    "aten.add_": (call(aten.add_.Tensor, "x", "y"), "x"),
    "aten out=": (call(aten.add.out, "x", "y", out="z"), "z"),
    "aten.index_copy_": (call(aten.index_copy_.default, "x", 0, "y", "z"), "x"),
    "torch.relu_": (call(torch.relu_, "x"), "x"),
    "inplace by keyword": (call(F.silu, "x", inplace=True), "x"),
    "inplace by position": (call(F.elu, "x", 1.0, True), "x"),
    "inplace dropout by position": (call(F.dropout, "x", 0.1, False, True), "x"),
    "a custom op": (call(torch.ops.fxfuse_tests.bump.default, "x", "y"), "y"),
    "a custom op without overload": (call(torch.ops.fxfuse_tests.bump, "x", "y"), "y"),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_seen_by_every_convention(name: str) -> None:
    node, written = WRITES[name]

    assert [argument.name for argument in mutated_arguments(node)] == [written]
    assert is_impure(node)


@pytest.mark.parametrize(
    "node",
    [
        call(operator.add, "x", "y"),
        call(operator.and_, "x", "y"),
        call(operator.or_, "x", "y"),
        call(operator.not_, "x"),
        call("__invert__", "x"),
        call("__and__", "x", "y"),
        call(F.silu, "x", inplace=False),
        call(F.elu, "x", 1.0, False),
        call(F.dropout, "x", 0.1, False, False),
        call(aten.add.Tensor, "x", "y"),
        call(torch.ops.aten.add, "x", "y"),
    ],
    ids=lambda node: str(getattr(node.target, "__name__", node.target)),
)
def test_what_writes_nothing_is_not_taken_for_a_write(node: fx.Node) -> None:
    assert mutated_arguments(node) == ()
    assert not is_impure(node)


def test_writes_are_seen_in_traced_models() -> None:
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ELU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y, mask = self.act(x * 2), x > 0
            mask &= x < 1
            y[0] = 3.0
            return y * mask

    traced = trace(Writer(), vectors())

    written = [str(getattr(node.target, "__name__", "")) for node in traced.gm.graph.nodes if mutated_arguments(node)]
    assert written == ["elu", "iand", "setitem"]


@pytest.mark.parametrize(
    ("node", "live"),
    [
        (call(F.dropout, "x", 0.1, True), True),
        (call(F.dropout, "x"), True),
        (call(F.dropout, "x", p=0.1), True),
        (call(F.dropout, "x", 0.1, False), False),
        (call(F.dropout, "x", 0.1, training=False), False),
        (call(F.dropout, "x", 0.0, True), False),
        (call(aten.dropout.default, "x", 0.1, True), True),
        (call(aten.dropout.default, "x", 0.1, False), False),
    ],
)
def test_dropout_is_live_in_training_only(node: fx.Node, live: bool) -> None:
    found = op(node)
    assert isinstance(found, Op)
    assert drops_randomly(found) is live


def test_the_borders_of_autocast_and_no_grad_are_barriers() -> None:
    class Bordered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = x * 2
            with torch.enable_grad():
                return x * 3

    traced = trace(Bordered(), vectors().float())

    borders = [node for node in traced.gm.graph.nodes if is_barrier(node)]
    assert len(borders) == 4
    assert not any(is_barrier(node) for node in traced.gm.graph.nodes if op(node) is not None)


@pytest.mark.parametrize(
    ("node", "pointwise"),
    [
        (call(torch.atan, "x"), True),
        (call("round", "x"), True),
        (call(torch.ops.aten.softshrink.default, "x"), True),
        (call(torch.lerp, "x", "y", 0.5), True),
        (call(torch.cumsum, "x", 0), False),
        (call(torch.bernoulli, "x"), False),
        (call("atan_", "x"), False),
        (call(F.silu, "x"), True),
        (call(torch.softmax, "x", -1), False),
    ],
    ids=lambda node: str(getattr(node.target, "__name__", node.target)) if isinstance(node, fx.Node) else "",
)
def test_of_an_op_without_a_name_pytorch_says_whether_it_is_pointwise(node: fx.Node, pointwise: bool) -> None:
    found = op(node)

    assert (found is not None and is_pointwise(found)) == pointwise


def test_a_triton_kernel_of_the_models_own_writes_all_that_it_is_given() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    tensors = {"in_ptr": x, "out_ptr": y}
    node = graph.call_function(torch.ops.higher_order.triton_kernel_wrapper_mutation, (), {"kwargs": tensors})

    assert mutated_arguments(node) == (x, y)


def test_an_op_that_may_return_its_input_is_no_new_value() -> None:
    graph = fx.Graph()

    assert op(graph.call_function(torch.positive, (graph.placeholder("x"),))) is None
