"""The ops on a CPU: values, gradients, compilation, export, and what is refused."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck

import fxfuse.kernels  # noqa: F401  # registers the ops
from fxfuse.errors import KernelError
from fxfuse.kernels import aten, ops
from fxfuse.kernels.calls import ACTIVATIONS
from tests.kernels import reference
from tests.kernels.cases import DTYPES, Case, assert_exact_enough, draw

OPS = torch.ops.fxfuse
TENSORS = 8  # of wide_ffn's arguments, the first so many are tensors


def halves(case: Case) -> list[tuple[Callable[..., Tensor], list[object]]]:
    hidden = torch.randn(*case.x.shape[:-1], case.gate_up.shape[1], dtype=case.x.dtype)
    first = [case.x, case.gate_up, case.gate_up_bias, case.gain, case.rstd, case.eps, case.activation]
    return [
        (OPS.gate_up_act.default, first),
        (OPS.down_add.default, [hidden, case.down, case.residual, case.down_bias]),
    ]


def learning(arguments: list[object]) -> list[object]:
    return [argument.requires_grad_() if isinstance(argument, Tensor) else argument for argument in arguments]


cases = st.builds(
    draw,
    tokens=st.sampled_from([(1,), (5,), (2, 3), (1, 1, 7), (0,)]),
    d=st.sampled_from([1, 3, 8]),
    width=st.sampled_from([1, 5, 16]),
    dtype=st.just(torch.float64),
    gated=st.booleans(),
    biases=st.booleans(),
    residual=st.booleans(),
    gain=st.booleans(),
    norm=st.sampled_from(["none", "rstd", "eps"]),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 99),
)


@given(cases)
@settings(max_examples=150)
def test_wide_ffn_is_its_reference(case: Case) -> None:
    torch.testing.assert_close(
        OPS.wide_ffn(*case.arguments), reference.wide_ffn(*case.arguments), rtol=1e-12, atol=1e-12
    )


@given(cases)
@settings(max_examples=50)
def test_the_halves_are_their_references(case: Case) -> None:
    (first, arguments), (second, others) = halves(case)
    torch.testing.assert_close(first(*arguments), reference.gate_up_act(*arguments), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second(*others), reference.down_add(*others), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["rstd", "eps"])
def test_low_precision_is_as_exact_as_plain_torch(dtype: torch.dtype, norm: str) -> None:
    case = draw((4, 9), 96, 160, dtype, norm=norm, gain=True)
    assert_exact_enough(OPS.wide_ffn(*case.arguments), case)


def test_float16_does_not_overflow_where_normalised_tokens_do_not() -> None:
    case = draw((4,), 64, 32, torch.float16, biases=False, residual=False)
    loud = Case(case.x * 4000, *case.arguments[1:])  # its un-normalised products are far above 65504
    made = OPS.wide_ffn(*loud.arguments)
    assert made.isfinite().all()
    assert_exact_enough(made, loud)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norm", ["none", "rstd", "eps"])
def test_gradients_to_every_tensor(activation: str, gated: bool, norm: str) -> None:
    case = draw((2, 2), 4, 5, torch.float64, gated=gated, gain=True, norm=norm, activation=activation, seed=3)
    arguments = learning(list(case.arguments))
    fixed = arguments[TENSORS:]
    assert torch.autograd.gradcheck(lambda *tensors: OPS.wide_ffn(*tensors, *fixed), arguments[:TENSORS])
    for op, own in halves(case):
        assert torch.autograd.gradcheck(op, learning(own))


def test_gradients_only_where_they_are_wanted() -> None:
    case = draw((3,), 4, 5, torch.float64, gain=True)
    for index, argument in enumerate(case.arguments[:TENSORS]):
        if argument is None:
            continue
        one = [each.detach() if isinstance(each, Tensor) else each for each in case.arguments]
        one[index] = argument.clone().requires_grad_()
        OPS.wide_ffn(*one).sum().backward()
        every = learning([each.detach() if isinstance(each, Tensor) else each for each in case.arguments])
        OPS.wide_ffn(*every).sum().backward()
        torch.testing.assert_close(one[index].grad, every[index].grad)


def test_backward_keeps_no_hidden_units() -> None:
    case = draw((64,), 8, 512, torch.float64)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        OPS.wide_ffn(*learning(list(case.arguments))).sum()
    largest = max(tensor.numel() for tensor in case.arguments if isinstance(tensor, Tensor))
    assert kept
    assert max(kept) == largest < 64 * 512


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norm", ["rstd", "eps"])
def test_opcheck(gated: bool, norm: str) -> None:
    case = draw((2, 3), 4, 6, torch.float32, gated=gated, norm=norm, gain=True)
    opcheck(OPS.wide_ffn.default, tuple(learning(list(case.arguments))))
    for op, arguments in halves(case):
        opcheck(op, tuple(learning(arguments)))


@given(cases)
@settings(max_examples=50)
def test_fake_tensors_have_the_shape_and_strides_of_real_ones(case: Case) -> None:
    turned = Case(case.x.transpose(0, -2).contiguous().transpose(0, -2), *case.arguments[1:])
    opcheck(OPS.wide_ffn.default, turned.arguments, test_utils=["test_schema", "test_faketensor"])


class Block(nn.Module):
    """A residual FFN whose parameters are the packed tensors."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        case = draw((1,), d, width, torch.float64, gain=True)
        self.weights = nn.ParameterList(
            [case.gate_up, case.down, case.gate_up_bias, case.down_bias, case.gain]  # type: ignore[list-item]  # not None
        )

    def forward(self, x: Tensor) -> Tensor:
        gate_up, down, gate_up_bias, down_bias, gain = self.weights
        return OPS.wide_ffn(x, gate_up, down, x, gate_up_bias, down_bias, gain, None, 1e-6, "gelu_tanh")

    def plain(self, x: Tensor) -> Tensor:
        gate_up, down, gate_up_bias, down_bias, gain = self.weights
        return reference.wide_ffn(x, gate_up, down, x, gate_up_bias, down_bias, gain, None, 1e-6, "gelu_tanh")


def test_compiles_in_one_graph_with_gradients_for_every_length() -> None:
    block = Block(6, 16)
    graphs = 0

    def counting(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    compiled = torch.compile(block, backend=counting, fullgraph=True, dynamic=True)
    for tokens in (3, 5, 17):
        x = torch.randn(2, tokens, 6, dtype=torch.float64)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        made, wanted = compiled(mine), block.plain(theirs)
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-10)
        gradients = torch.autograd.grad(made.square().sum(), [mine, *block.parameters()])
        others = torch.autograd.grad(wanted.square().sum(), [theirs, *block.parameters()])
        torch.testing.assert_close(gradients, others, rtol=1e-9, atol=1e-9)
    assert graphs == 1


@pytest.mark.slow
def test_compiles_under_inductor() -> None:
    block = Block(6, 16).float()
    x = torch.randn(5, 6, requires_grad=True)
    made = torch.compile(block, fullgraph=True)(x)
    torch.testing.assert_close(made.double(), block.plain(x), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(made.sum(), x)
    (wanted,) = torch.autograd.grad(block.plain(x).sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_exports_with_a_dynamic_number_of_tokens() -> None:
    block = Block(6, 16)
    tokens = torch.export.Dim("tokens")
    x = torch.randn(4, 6, dtype=torch.float64)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: tokens},))
    assert any(node.target is OPS.wide_ffn.default for node in program.graph.nodes)
    more = torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(program.module()(more), block.plain(more), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up": torch.zeros(3, 5, 4)}, "gate_up"),
        ({"gate_up": torch.zeros(2, 5, 7)}, "gate_up"),
        ({"x": torch.zeros(4)}, "x must be"),
        ({"down": torch.zeros(4, 6)}, "down must be"),
        ({"residual": torch.zeros(3, 5)}, "residual must be"),
        ({"gate_up_bias": torch.zeros(5)}, "gate_up_bias must be"),
        ({"down_bias": torch.zeros(5)}, "down_bias must be"),
        ({"gain": torch.zeros(5)}, "gain must be"),
        ({"rstd": torch.zeros(2), "eps": None}, "rstd must be"),
        ({"rstd": torch.zeros(3, dtype=torch.float16), "eps": None}, "rstd must be torch.float32"),
        ({"rstd": torch.zeros(3)}, "not both"),
        ({"gain": torch.zeros(4, dtype=torch.float64)}, "one floating-point dtype"),
        ({"activation": "swish"}, "activation must be one of silu"),
        ({"down_bias": torch.zeros(4, device="meta")}, "on one device; these are on cpu, meta"),
        ({"gate_up_bias": torch.zeros(2, 5, device="meta")}, "on one device"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    case = draw((3,), 4, 5, torch.float32)
    arguments = {name: getattr(case, name) for name in case.__dataclass_fields__} | change
    with pytest.raises(KernelError, match=message):
        OPS.wide_ffn(**arguments)


def test_neither_the_package_nor_its_ops_on_a_cpu_need_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fxfuse, fxfuse.kernels\n"
        "x = torch.ones(1, 2)\n"
        "print(torch.ops.fxfuse.wide_ffn(x, torch.ones(1, 2, 2), torch.ones(2, 2), x, activation='relu').tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[[5.0, 5.0]]", done.stderr


def test_float64_is_atens_on_a_gpu_too() -> None:
    """A wide FFN is verified in float64 where the model is, and the Triton kernels do not have it."""
    assert ops._triton(torch.empty(2, 3, dtype=torch.float64)) is aten
