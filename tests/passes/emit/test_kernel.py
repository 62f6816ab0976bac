"""Wide FFNs as calls of fxfuse's own ops, which on a CPU compute in ATen what the Triton kernels do on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from fxfuse import Plan
from fxfuse.backend.options import Options
from fxfuse.errors import OptionError
from fxfuse.hardware import cost, gpus
from fxfuse.passes import REPORTS, apply_plan
from fxfuse.passes.emit.kernel import ALIGNMENT, hint
from tests.integration.test_styles import STYLES, side_by_side
from tests.models import spec as s
from tests.models.blocks import HIDDEN, MLP, WIDTH, Layer, Stream, SwiGLU, Traced, assert_same, ready, trace, vectors
from tests.models.norms import make_norm

GROUP = Plan(parallel=[["layers.0.body", "layers.1.body"]])
WITHOUT = {
    "clamped",
    "units masked",
    "multiplied gate",
    "activation with learned numbers",
    "activation with a number for each unit",
}
"""Styles whose activation the kernels do not have."""


def planned(model: Stream, kernels: str = "fxfuse", road: str = "dynamo") -> Traced:
    traced = trace(model, vectors(), road=road)
    apply_plan(traced.gm, GROUP, names=traced.names, strict=True, kernels=kernels)  # type: ignore[arg-type]
    return traced


def calls(traced: Traced) -> list[fx.Node]:
    return list(traced.gm.graph.find_nodes(op="call_function", target=torch.ops.fxfuse.wide_ffn.default))


def argument(node: fx.Node, name: str) -> object:
    names = [each.name for each in torch.ops.fxfuse.wide_ffn.default._schema.arguments]
    return node.args[names.index(name)]


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.becomes == "wide"])
def test_what_can_be_wide_can_be_a_kernels(name: str) -> None:
    style = STYLES[name]
    model = ready(Stream(style.make(), style.make()))

    traced = planned(model)

    assert_same(traced(), side_by_side(model, vectors()))
    assert len(calls(traced)) == (name not in WITHOUT)


def test_a_number_on_a_norms_output_is_folded_and_the_norm_computed_by_the_kernel() -> None:
    class Scaled(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.norm, self.by = nn.RMSNorm(WIDTH, eps=1e-5), by

        def forward(self, x: Tensor) -> Tensor:
            return self.by * self.norm(x)

    model = ready(Stream(*(Layer(SwiGLU(), Scaled(by)) for by in (1.7, 0.6))))
    traced = planned(model)

    assert_same(traced(), side_by_side(model, vectors()))
    (call,) = calls(traced)
    assert argument(call, "eps") == 1e-5


def test_the_report_says_what_computes_it() -> None:
    def detail(model: Stream) -> str:
        (report,) = [each for each in planned(model).gm.meta[REPORTS] if each.name == "fuse_ffn"]
        return report.done[0].detail

    assert detail(ready(Stream(SwiGLU(), SwiGLU()))).endswith("by fxfuse's kernels")
    own = STYLES["clamped"].make
    assert "by ATen, because fxfuse's kernels do not have its activation" in detail(ready(Stream(own(), own())))


def test_on_a_cpu_they_are_written_only_if_asked_for() -> None:
    model = ready(Stream(SwiGLU(), SwiGLU()))

    assert not calls(planned(model, "auto"))
    assert not calls(planned(model, "aten"))
    assert calls(planned(model, "fxfuse"))


@pytest.mark.parametrize(
    ("dtype", "capability", "written"),
    [
        (torch.bfloat16, (9, 0), True),
        (torch.float32, (8, 0), True),
        (torch.float64, (9, 0), False),
        (torch.float16, (7, 5), False),
    ],
)
def test_on_a_gpu_that_can_run_them_they_are_written_by_themselves(
    dtype: torch.dtype, capability: tuple[int, int], written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU of which only the name is there: the graph's weights have no data and say that they are on it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    traced = on_a_gpu(trace(ready(Stream(SwiGLU(), SwiGLU())), vectors()), dtype)

    apply_plan(traced.gm, GROUP, names=traced.names)

    assert len(calls(traced)) == written


def on_a_gpu(traced: Traced, dtype: torch.dtype) -> Traced:
    with FakeTensorMode():
        for node in traced.gm.graph.nodes:
            known = node.meta.get("example_value")
            if isinstance(known, Tensor):
                node.meta["example_value"] = torch.empty(known.shape, dtype=dtype, device="cuda")
    return traced


@pytest.mark.parametrize(("precision", "written"), [("highest", 1), ("high", 0)])
def test_float32_that_may_be_rounded_to_tf32_is_cublass(
    precision: str, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels multiply float32 as it is, without tensor cores: a fraction of the rate that was asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    traced = on_a_gpu(trace(ready(Stream(SwiGLU(), SwiGLU())), vectors()), torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        apply_plan(traced.gm, GROUP, names=traced.names)
    finally:
        torch.set_float32_matmul_precision(before)

    assert len(calls(traced)) == written


def merged(model: Stream, kernels: str = "fxfuse") -> Traced:
    traced = trace(model, vectors())
    apply_plan(traced.gm, Plan(), names=traced.names, merge_gate_up=True, kernels=kernels)  # type: ignore[arg-type]
    return traced


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.becomes == "wide"])
def test_an_ffn_alone_can_be_a_kernels_if_it_has_a_gate(name: str) -> None:
    style = STYLES[name]
    model = ready(Stream(style.make(), style.make()))

    traced = merged(model)

    assert_same(traced(), model(vectors()))
    assert {len(argument_shape(traced, call)) for call in calls(traced)} <= {3}
    assert all(argument_shape(traced, call)[0] == 2 for call in calls(traced))


def argument_shape(traced: Traced, call: fx.Node) -> torch.Size:
    values = fx.Interpreter(traced.gm, garbage_collect_values=False)
    values.run(*traced.inputs)
    gate_up = values.env[call.args[1]]  # type: ignore[index]
    assert isinstance(gate_up, Tensor)
    return gate_up.shape


def test_each_ffn_alone_is_one_call_that_adds_to_the_stream() -> None:
    traced = merged(ready(Stream(SwiGLU(), SwiGLU())))

    assert len(calls(traced)) == 2
    assert not traced.count("add")
    (report,) = [each for each in traced.gm.meta[REPORTS] if each.name == "fuse_ffn"]
    assert [edit.branches for edit in report.done] == [("layers.0.body",), ("layers.1.body",)]
    assert not report.refused


def test_an_ffn_alone_copies_its_down_projection_only_to_pad_it_or_to_lay_it_out() -> None:
    def down(body: SwiGLU) -> str:
        (call,) = calls(merged(ready(Stream(body))))
        node = argument(call, "down")
        assert isinstance(node, fx.Node)
        return node.op

    assert down(SwiGLU(hidden=ALIGNMENT)) == "placeholder"
    assert down(SwiGLU(hidden=ALIGNMENT + 1)) == "call_function"
    turned = SwiGLU(hidden=ALIGNMENT)
    turned.down.weight = nn.Parameter(turned.down.weight.detach().T.contiguous().T)
    assert down(turned) == "call_function"


def test_an_ffn_alone_is_left_to_its_compiler_unless_its_gate_and_up_are_merged() -> None:
    traced = planned(ready(Stream(SwiGLU(), SwiGLU())))
    assert len(calls(traced)) == 1  # the group's
    traced = trace(ready(Stream(SwiGLU(), SwiGLU())), vectors())
    apply_plan(traced.gm, Plan(), names=traced.names, kernels="fxfuse")
    assert not calls(traced)


def test_what_the_kernels_cannot_take_is_merged_as_ever() -> None:
    own = STYLES["clamped"].make
    model = ready(Stream(own(), own()))

    traced = merged(model)

    assert not calls(traced)
    (report,) = [each for each in traced.gm.meta[REPORTS] if each.name == "merge_gate_up"]
    assert len(report.done) == 2
    assert_same(traced(), model(vectors()))


@pytest.mark.parametrize("pays", [False, True])
def test_on_a_gpu_an_ffn_alone_is_a_kernels_where_that_is_modelled_to_pay(
    pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[cost.Layer] = []

    def modelled(layer: cost.Layer, gpu: gpus.Gpu) -> bool:
        assert gpu == gpus.find("h100")
        asked.append(layer)
        return pays

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(gpus, "of_device", lambda device: gpus.find("h100"))
    monkeypatch.setattr(cost, "pays", modelled)
    traced = on_a_gpu(trace(ready(Stream(SwiGLU(), SwiGLU())), vectors()), torch.bfloat16)
    apply_plan(traced.gm, Plan(), names=traced.names, merge_gate_up=True)

    assert len(calls(traced)) == (2 if pays else 0)
    tokens = vectors().numel() // WIDTH
    assert asked == [cost.Layer(WIDTH, HIDDEN, tokens, dtype=torch.bfloat16)] * 2


def test_the_number_of_tokens_that_counts_is_that_of_the_trace() -> None:
    seen: list[int | None] = []

    def look(gm: fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        (node,) = [node for node in gm.graph.nodes if isinstance(node.meta.get("example_value"), Tensor)][:1]
        seen.extend(hint(size) for size in node.meta["example_value"].shape)
        return gm.forward

    torch.compile(lambda x: x + 1, backend=look, dynamic=True)(torch.randn(5, 3))
    assert seen == [5, 3]


@pytest.mark.slow
def test_ffns_alone_train_and_follow_their_weights() -> None:
    model = ready(Stream(SwiGLU(), SwiGLU(bias=True))).float()
    options = {"kernels": "fxfuse", "merge_gate_up": True}
    compiled = torch.compile(model, backend="ffnfuse", options=options)  # type: ignore[arg-type]
    x = vectors(2, 3, WIDTH).float()
    for _ in range(2):
        mine, wanted = compiled(x), model(x)
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
        gradients, others = (torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (mine, wanted))
        torch.testing.assert_close(gradients, others, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)


NORMS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "one call": (lambda: nn.RMSNorm(WIDTH, eps=1e-3), True),
    "written out": (lambda: make_norm(s.Norm("rms_gain_plus_one", eps=1e-3), WIDTH), True),
    "without a gain": (lambda: make_norm(s.Norm("rms_parameterless", eps=1e-3), WIDTH), True),
    "divided": (lambda: By(lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3)), True),
    "of the product": (lambda: By(lambda x: x * torch.rsqrt(1e-3 + (x * x).mean(-1, keepdim=True))), True),
    "eps beside the mean": (lambda: By(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-3), False),
    "of tokens": (lambda: By(lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3)), False),
    "of cubes": (lambda: By(lambda x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-3)), False),
    "of another value": (lambda: By(lambda x: x * torch.rsqrt((2 * x).pow(2).mean(-1, keepdim=True) + 1e-3)), False),
    "rounded": (lambda: By(lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-3)), False),
    "default eps": (lambda: nn.RMSNorm(WIDTH), False),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), False),
}


class By(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", NORMS)
def test_a_kernel_takes_an_rms_norm_along_and_no_other(name: str) -> None:
    make, known = NORMS[name]
    model = ready(Stream(*(Layer(SwiGLU(), make()) for _ in range(2))))

    traced = planned(model)

    (call,) = calls(traced)
    assert argument(call, "eps") == (1e-3 if known else None)
    assert_same(traced(), side_by_side(model, vectors()))


def test_it_adds_to_the_stream_itself() -> None:
    traced = planned(ready(Stream(SwiGLU(), SwiGLU())))

    (call,) = calls(traced)
    assert argument(call, "residual") is argument(call, "x")
    assert not traced.count("add")


def test_a_contribution_that_is_read_by_itself_is_not_added_twice() -> None:
    class Tapped(Stream):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.start(x)
            made = self.layers[0].branch(h) + self.layers[1].branch(h)
            return h + made, made * 2

    model = ready(Tapped(SwiGLU(), SwiGLU()))
    traced = trace(model, vectors())
    apply_plan(traced.gm, Plan(), names=traced.names, kernels="fxfuse")

    assert_same(traced(), model(vectors()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("body", [SwiGLU, MLP])
def test_hidden_units_are_padded(body: Callable[..., nn.Module], bias: bool) -> None:
    assert 2 * HIDDEN % ALIGNMENT
    model = ready(Stream(body(bias=bias) if body is SwiGLU else body(), body()))

    traced = planned(model)

    (call,) = calls(traced)
    down = call.args[2]
    assert isinstance(down, fx.Node)
    assert_same(traced(), side_by_side(model, vectors()))
    values = fx.Interpreter(traced.gm, garbage_collect_values=False)
    values.run(*traced.inputs)
    assert values.env[down].shape == (WIDTH, -(-2 * HIDDEN // ALIGNMENT) * ALIGNMENT)


def test_under_autocast_aten_computes() -> None:
    """It is autocast that says in which dtype an FFN computes, and it says it of ATen's ops only."""

    class Cast(Stream):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    model = Cast(SwiGLU(), SwiGLU())
    traced = trace(model, vectors().float())
    apply_plan(traced.gm, GROUP, names=traced.names, strict=True, kernels="fxfuse")

    assert not calls(traced)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_compiles_around_them(dynamic: bool) -> None:
    model = ready(Stream(SwiGLU(), SwiGLU(bias=True))).float()
    options = {"plan": GROUP, "kernels": "fxfuse"}
    compiled = torch.compile(model, backend="ffnfuse", options=options, dynamic=dynamic)  # type: ignore[arg-type]
    for tokens in (3, 4):
        x = vectors(2, tokens, WIDTH).float()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), side_by_side(model, x), rtol=1e-4, atol=1e-5)


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(OptionError, match="'auto', 'fxfuse' or 'aten', not 'triton'"):
        Options.parse({"kernels": "triton"})
    with pytest.raises(OptionError, match="leave out weights='share'"):
        Options.parse({"kernels": "fxfuse", "weights": "share"})


@pytest.mark.parametrize(
    "activation",
    [
        F.silu,
        lambda g: g * torch.sigmoid(g),
        lambda g: torch.sigmoid(g) * g,
        F.gelu,
        lambda g: F.gelu(g, approximate="tanh"),
        F.relu,
        lambda g: F.relu(g) ** 2,
        lambda g: F.relu(g) * F.relu(g),
        torch.sigmoid,
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_activations_by_any_spelling(activation: Callable[[Tensor], Tensor], gated: bool) -> None:
    class FFN(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            hidden = activation(self.gate(x))
            return self.down(hidden * self.up(x) if gated else hidden)

    model = ready(Stream(FFN(), FFN()))

    traced = planned(model)

    assert len(calls(traced)) == 1
    assert_same(traced(), side_by_side(model, vectors()))


@pytest.mark.parametrize(
    "activation",
    [torch.tanh, lambda g: g, lambda g: g * torch.sigmoid(2 * g), lambda g: F.relu(g) ** 3, F.mish, F.elu],
)
def test_other_activations_are_atens(activation: Callable[[Tensor], Tensor]) -> None:
    class FFN(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(activation(self.gate(x)) * self.up(x))

    model = ready(Stream(FFN(), FFN()))

    traced = planned(model)

    assert not calls(traced)
    assert_same(traced(), side_by_side(model, vectors()))
