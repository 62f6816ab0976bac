"""One model in the words of every tracer: the same branches, the same plan, the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch._inductor.decomposition import select_decomp_table
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from fxfuse import Plan
from fxfuse.backend.frontend import capture
from fxfuse.errors import CaptureError, OptionError
from fxfuse.graph.values import name_weights, names_in, same_shape, shape
from fxfuse.passes import REPORTS, apply_plan, drop, fuse_ffn, merge_gate_up, parallelize, simplify
from fxfuse.stream.branch import number_of_parameters
from fxfuse.stream.finder import find_streams
from tests.models.blocks import (
    GLU,
    HIDDEN,
    MLP,
    WIDTH,
    Attention,
    Decoder,
    Layer,
    PackedSwiGLU,
    Stream,
    SwiGLU,
    assert_same,
    flat_tensors,
    ready,
    vectors,
)


class GeGLU(nn.Module):
    """All in modules, with an idle dropout behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
        self.gate, self.dropout = nn.Linear(WIDTH, HIDDEN), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.act(self.gate(x)) * self.up(x)))


class InPlace(MLP):
    """An activation that overwrites what it gets."""

    def __init__(self) -> None:
        super().__init__(activation=nn.ReLU(inplace=True))


class Squared(MLP):
    def __init__(self) -> None:
        super().__init__(activation=lambda x: F.relu(x).square())


# What the layers of the model are made of; two of each kind follow each other.
KINDS: tuple[tuple[Callable[[], nn.Module], Callable[[], nn.Module]], ...] = (
    (lambda: SwiGLU(bias=True), lambda: nn.LayerNorm(WIDTH)),
    (PackedSwiGLU, lambda: nn.RMSNorm(WIDTH, eps=1e-5)),
    (GeGLU, lambda: nn.LayerNorm(WIDTH)),
    (lambda: GLU(nn.GLU()), lambda: nn.RMSNorm(WIDTH, eps=1e-5)),
    (Squared, lambda: nn.LayerNorm(WIDTH, bias=False)),
    (InPlace, lambda: nn.LayerNorm(WIDTH, elementwise_affine=False)),
)


class Model(Decoder):
    """Three attentions, and then one FFN behind the other."""

    depth = 2 * len(KINDS)

    def __init__(self) -> None:
        super().__init__()
        for index, layer in enumerate(self.layers):
            ffn, norm = KINDS[index // 2]
            layer.mlp, layer.mlp_norm = ffn(), norm()

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.5
        for index, layer in enumerate(self.layers):
            if index < 3:
                h = h + layer.attn(layer.attn_norm(h))
            h = h + layer.mlp(layer.mlp_norm(h))
        return self.head(self.norm(h))

    def planned(self, x: Tensor) -> Tensor:
        """What PLAN makes of it."""
        h = x * 1.5
        for index in range(0, self.depth, 2):
            if index < 3:
                h = h + self.attn(index, h)
            h = h + self.mlp(index, h) + self.mlp(index + 1, h)
        return self.head(self.norm(h))


PAIRS = [(f"layers.{index}.mlp", f"layers.{index + 1}.mlp") for index in range(0, Model.depth, 2)]
PLAN = Plan(drop=["layers.1.attn"], parallel=PAIRS)
BRANCHES = [f"layers.{i}.{part}" for i in range(Model.depth) for part in ("attn", "mlp") if part == "mlp" or i < 3]


@dataclass
class Spoken:
    """A graph, and what its dialect does not tell of it."""

    gm: fx.GraphModule
    inputs: tuple[object, ...]
    known: dict[str, object] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, ...]:
        return flat_tensors(self.gm(*self.inputs))


def traced_with(**options: object) -> Callable[[nn.Module, Tensor], Spoken]:
    def trace(model: nn.Module, x: Tensor) -> Spoken:
        with torch.no_grad():
            gm = make_fx(model, **options, _allow_non_fake_inputs=True)(x)
        return Spoken(gm, (x,), {"root": model})

    return trace


def lifted(model: nn.Module, x: Tensor) -> Spoken:
    """The parameters as inputs of the graph."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        gm = make_fx(lambda weights, x: functional_call(model, weights, (x,)))(parameters, x)
    inputs = (*parameters.values(), x)
    return Spoken(gm, (parameters, x), {"names": names_in(model, gm, inputs)})


def dynamo(model: nn.Module, x: Tensor) -> Spoken:
    (captured,) = capture(model, x)
    return Spoken(captured.gm, captured.inputs, {"names": captured.names})


def exported(decomposed: bool) -> Callable[[nn.Module, Tensor], Spoken]:
    def trace(model: nn.Module, x: Tensor) -> Spoken:
        program = torch.export.export(model, (x,))
        gm = (program.run_decompositions() if decomposed else program).module()
        assert isinstance(gm, fx.GraphModule)
        return Spoken(gm, (x,))

    return trace


def shaped(model: nn.Module, x: Tensor) -> Spoken:
    gm = fx.symbolic_trace(model)
    ShapeProp(gm).propagate(x)
    return Spoken(gm, (x,))


class Leaves(fx.Tracer):
    """Traces into everything but attentions."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Attention) or super().is_leaf_module(m, module_qualified_name)


DIALECTS: dict[str, Callable[[nn.Module, Tensor], Spoken]] = {
    "dynamo": dynamo,
    "export": exported(decomposed=False),
    "export, decomposed": exported(decomposed=True),
    "symbolic_trace": lambda model, x: Spoken(fx.symbolic_trace(model), (x,)),
    "symbolic_trace with inputs": lambda model, x: Spoken(fx.symbolic_trace(model), (x,), {"inputs": (x,)}),
    "symbolic_trace with ShapeProp": shaped,
    "symbolic_trace with leaves": lambda model, x: Spoken(fx.GraphModule(model, Leaves().trace(model)), (x,)),
    "make_fx": traced_with(),
    "make_fx, symbolic": traced_with(tracing_mode="symbolic"),
    "make_fx, core aten": traced_with(decomposition_table=core_aten_decompositions()),
    "make_fx, inductor": traced_with(decomposition_table=select_decomp_table(), tracing_mode="symbolic"),
    "make_fx, lifted": lifted,
}
in_every_dialect = pytest.mark.parametrize("dialect", DIALECTS)


@in_every_dialect
def test_a_plan_means_the_same_in_every_dialect(dialect: str) -> None:
    model = ready(Model())
    spoken = DIALECTS[dialect](model, vectors())

    apply_plan(spoken.gm, PLAN, strict=True, **spoken.known)

    assert_same(spoken(), model.planned(vectors()))
    reports = {report.name: report for report in spoken.gm.meta[REPORTS]}
    assert [edit.branches for edit in reports["fuse_ffn"].done] == PAIRS
    assert not reports["fuse_ffn"].refused
    assert [str(edit) for edit in reports["drop"].done] == ["dropped layers.1.attn"]


@in_every_dialect
def test_each_pass_alone_takes_every_dialect(dialect: str) -> None:
    """In the order that a person would call them in; what names the dialect lacks are given once."""
    model = ready(Model())
    spoken = DIALECTS[dialect](model, vectors())
    gm, known = spoken.gm, dict(spoken.known)
    inputs, root = known.pop("inputs", None), known.pop("root", None)
    name_weights(names_in(root, gm) if root is not None else known.get("names", {}))

    simplify(gm, inputs)
    assert [branch.name for stream in find_streams(gm) for branch in stream.branches] == BRANCHES
    drop(gm, ["layers.1.attn"])
    parallelize(gm, PAIRS)
    assert len(fuse_ffn(gm).done) == len(PAIRS)
    merge_gate_up(gm)

    assert_same(spoken(), model.planned(vectors()))


@pytest.mark.parametrize("dialect", ["symbolic_trace", "symbolic_trace with inputs", "make_fx, inductor"])
def test_a_graph_for_all_sizes_stays_one(dialect: str) -> None:
    model = ready(Model())
    spoken = DIALECTS[dialect](model, vectors())
    apply_plan(spoken.gm, PLAN, **spoken.known)

    for sizes in ((3, 5, WIDTH), (2, 2, WIDTH)):
        with torch.no_grad():
            assert_same(flat_tensors(spoken.gm(vectors(*sizes))), model.planned(vectors(*sizes)))


def test_without_the_root_the_branches_of_make_fx_have_numbers() -> None:
    spoken = DIALECTS["make_fx"](ready(Model()), vectors())

    names = [branch.name for stream in find_streams(spoken.gm) for branch in stream.branches]

    assert names == [f"@{index}" for index in range(len(BRANCHES))]


class Flat(SwiGLU):
    """Rows in two dimensions: a view, that only sizes tell from one that mixes tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, WIDTH)).view(x.shape)


class Casting(nn.RMSNorm):
    """OLMo 2's: in a wider dtype, and back to what it was after the gain."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float64)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight * x).to(dtype)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Layer(Flat()), "does not tell the sizes of"),
        (lambda: Layer(SwiGLU(), Casting(WIDTH)), "what to does with them is not known"),
    ],
    ids=["a view", "casts"],
)
def test_what_only_sizes_tell_is_refused_without_them_and_done_with_them(
    make: Callable[[], nn.Module], reason: str
) -> None:
    model, plan = ready(Stream(make(), make())), Plan(parallel=[["layers.0.body", "layers.1.body"]])
    h = vectors() * 1.5
    expected = h + model.branch(0, h) + model.branch(1, h)

    for inputs in (None, (vectors(),)):
        gm = fx.symbolic_trace(model)
        apply_plan(gm, plan, inputs=inputs, strict=True)

        with torch.no_grad():
            assert_same(flat_tensors(gm(vectors())), expected)
        reports = {report.name: report for report in gm.meta[REPORTS]}
        assert len(reports["fuse_ffn"].done) == (inputs is not None)
        if inputs is None:
            branches = [branch for stream in find_streams(gm) for branch in stream.branches]
            told = [edit.detail for edit in reports["fuse_ffn"].refused] or [branch.reason for branch in branches]
            assert all(reason in text for text in told)


def test_sizes_that_are_equal_by_chance_are_not_taken_for_one() -> None:
    class Turned(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1))

    gm = fx.symbolic_trace(ready(Turned()))

    simplify(gm, (vectors(3, 3, WIDTH),))

    x, turned, *_ = gm.graph.nodes
    assert not same_shape(x, turned)
    sizes = shape(turned)
    assert sizes is not None
    assert sizes[-1] == WIDTH


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ((), OptionError, "takes 1 values, and 0 were given"),
        ((vectors(2, 3, WIDTH + 1),), CaptureError, "does not run on values of their sizes"),
    ],
)
def test_inputs_that_are_none_of_the_graphs_are_an_error(
    inputs: tuple[Tensor, ...], error: type[Exception], words: str
) -> None:
    gm = fx.symbolic_trace(ready(Model()))
    before = gm.code

    with pytest.raises(error, match=words):
        apply_plan(gm, PLAN, inputs=inputs)

    assert gm.code == before


class TestLeaves:
    """Modules that the tracer was told not to look into."""

    def test_they_are_branches_with_names_kinds_and_parameters(self) -> None:
        model = ready(Model())
        gm = fx.GraphModule(model, Leaves().trace(model))
        simplify(gm)

        (stream,) = find_streams(gm)

        assert [branch.name for branch in stream.branches] == BRANCHES
        assert [branch.kind for branch in stream.branches][:3] == ["attention", "gated_ffn", "attention"]
        own = sum(p.numel() for part in (model.layers[0].attn, model.layers[0].attn_norm) for p in part.parameters())
        assert number_of_parameters(stream["layers.0.attn"]) == own

    def test_dropped_they_are_not_called(self) -> None:
        model = ready(Model())
        gm = fx.GraphModule(model, Leaves().trace(model))

        drop(gm, ["layers.1.attn"])

        assert "layers.1.attn" not in [node.target for node in gm.graph.nodes]

    def test_norms_among_them_keep_ffns_apart(self) -> None:
        class Opaque(fx.Tracer):
            def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
                return isinstance(m, Casting)

        model = ready(Stream(*(Layer(SwiGLU(), Casting(WIDTH)) for _ in range(2))))
        gm = fx.GraphModule(model, Opaque().trace(model))
        h = vectors() * 1.5

        apply_plan(gm, Plan(parallel=[["layers.0.body", "layers.1.body"]]), strict=True)

        with torch.no_grad():
            assert_same(flat_tensors(gm(vectors())), h + model.branch(0, h) + model.branch(1, h))
        (fusion,) = [report for report in gm.meta[REPORTS] if report.name == "fuse_ffn"]
        assert not fusion.done
        assert fusion.refused[0].detail == "it reads layers.0.norm, and layers.1.body reads layers.1.norm"
