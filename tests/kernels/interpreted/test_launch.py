"""The ops' way to the GPU, interpreted: which kernels a call becomes, and what they compute together."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxfuse.errors import KernelError
from fxfuse.hardware.gpus import GPUS, Gpu, find
from fxfuse.kernels.calls import ACTIVATIONS, Down, GateUp
from fxfuse.kernels.launch import FAR, Work, _matrix, down_work, gate_up_work, wide_work
from tests.kernels import packing as pack
from tests.kernels import reference
from tests.kernels.cases import (
    DTYPES,
    Case,
    assert_as_exact,
    assert_exact_enough,
    calls,
    draw,
    hidden_scale,
    judged,
    product_scale,
)

SMALL = replace(find("h100"), multiprocessors=4)  # so that small problems fill it, and splits are small


def finish(work: Work, like: Tensor) -> Tensor:
    for launch in work.launches:
        launch.run()
    return work.out.view(*like.shape[:-1], -1) if like.numel() else work.out


def wide(case: Case, gpu: Gpu) -> tuple[Work, Tensor]:
    first = GateUp(case.x, case.gate_up, case.gate_up_bias, case.gain, case.rstd, case.eps, case.activation)
    work = wide_work(first, case.down, case.residual, case.down_bias, gpu)
    return work, finish(work, case.x)


def cases(*tokens: int) -> st.SearchStrategy[Case]:
    return st.builds(
        draw,
        tokens=st.just(tokens),
        d=st.sampled_from([1, 16, 33, 64]),
        width=st.sampled_from([7, 16, 96]),
        dtype=st.sampled_from(DTYPES),
        gated=st.booleans(),
        biases=st.booleans(),
        residual=st.booleans(),
        gain=st.booleans(),
        norm=st.sampled_from(["none", "rstd", "eps"]),
        activation=st.sampled_from(ACTIVATIONS),
        seed=st.integers(0, 99),
    )


gpus = st.builds(
    replace,
    st.sampled_from([find(name) for name in ("a100", "a10", "h100")]),
    multiprocessors=st.sampled_from([1, 4, 132]),
)


@pytest.mark.parametrize("count", [1, 3, 41])
@given(st.data(), gpus)
@settings(max_examples=30)
def test_a_wide_ffn(count: int, data: st.DataObject, gpu: Gpu) -> None:
    case = data.draw(cases(judged(count)))
    assert_exact_enough(torch.cat([wide(part, gpu)[1] for part in calls(case, count)]), case)


@given(cases(2, 9), gpus)
@settings(max_examples=30)
def test_tokens_of_several_dimensions(case: Case, gpu: Gpu) -> None:
    assert_exact_enough(wide(case, gpu)[1], case)


@given(
    widths=st.lists(st.sampled_from([1, 8, 23]), min_size=1, max_size=4),
    tokens=st.sampled_from([1, 5, 40]),
    dtype=st.sampled_from(DTYPES),
    gated=st.booleans(),
    biases=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=50)
def test_packed_ffns_are_the_sum_of_parallel_ones(
    widths: list[int], tokens: int, dtype: torch.dtype, gated: bool, biases: bool, seed: int
) -> None:
    ffns = [
        draw((judged(tokens),), 32, width, dtype, gated=gated, biases=biases, residual=False, gain=True, seed=seed + i)
        for i, width in enumerate(widths)
    ]
    x, residual = ffns[0].x, torch.randn(judged(tokens), 32).to(dtype)
    ffns = [replace(ffn, x=x) for ffn in ffns]
    gates, ups = [ffn.gate_up[0] for ffn in ffns], [ffn.gate_up[1] for ffn in ffns] if gated else None
    gate_biases = [ffn.gate_up_bias[0] if ffn.gate_up_bias is not None else None for ffn in ffns]
    up_biases = [ffn.gate_up_bias[1] if ffn.gate_up_bias is not None else None for ffn in ffns] if gated else None
    packed = Case(
        x,
        pack.pack_gate_up(gates, ups, [ffn.gain for ffn in ffns]),
        pack.pack_down([ffn.down for ffn in ffns]),
        residual,
        pack.pack_bias(gate_biases, up_biases, widths),
        sum(ffn.down_bias for ffn in ffns) if biases else None,
        None,
        None,
        ffns[0].eps,
        "silu",
    )
    made = torch.cat([wide(part, SMALL)[1] for part in calls(packed, tokens)])

    exact, plain, squares = residual.double(), residual, residual.double().square()
    for ffn in ffns:
        exact = exact + reference.wide_ffn(*ffn.arguments)
        normed = F.rms_norm(x.float(), (32,), eps=ffn.eps).to(dtype) * ffn.gain
        biased = [None, None] if ffn.gate_up_bias is None else [*ffn.gate_up_bias, None]
        hidden = F.silu(F.linear(normed, ffn.gate_up[0], biased[0]))
        hidden = hidden * F.linear(normed, ffn.gate_up[1], biased[1]) if gated else hidden
        plain = plain + F.linear(hidden, ffn.down, ffn.down_bias)
        squares = squares + product_scale(hidden_scale(ffn), ffn.down, ffn.down_bias).square()
    assert_as_exact(made, plain, exact, squares.sqrt())


def kernels(work: Work) -> list[str]:
    return [f"{launch.kernel.fn.__module__.rpartition('.')[2]}.{launch.kernel.fn.__name__}" for launch in work.launches]


def test_few_tokens_are_two_launches_and_many_are_three() -> None:
    few, _ = wide(draw((3,), 64, 64, torch.bfloat16), SMALL)
    many, _ = wide(draw((65,), 64, 128, torch.bfloat16), replace(SMALL, multiprocessors=1))
    given_rstd, _ = wide(draw((65,), 64, 128, torch.bfloat16, norm="rstd"), replace(SMALL, multiprocessors=1))
    assert kernels(few) == ["gate_up.pointer_kernel", "down.pointer_kernel"]
    assert kernels(many) == ["rstd.kernel", "gate_up.tma_kernel", "down.tma_kernel"]
    assert kernels(given_rstd) == ["gate_up.tma_kernel", "down.tma_kernel"]


def test_a_split_depth_counts_in_what_kernel_1_zeroed() -> None:
    case = draw((3,), 32, 2048, torch.bfloat16)
    work, made = wide(case, find("h100"))
    assert work.launches[1].arguments["SPLIT"] > 1
    assert work.launches[0].arguments["counters_ptr"] is work.launches[1].arguments["counters_ptr"]
    assert_exact_enough(made, case)
    first = made.clone()
    for launch in work.launches:  # as a captured graph replays it
        launch.run()
    assert torch.equal(work.out.view_as(first), first)


def test_down_alone_makes_its_own_zeros() -> None:
    case = draw((3,), 32, 2048, torch.bfloat16)
    hidden = torch.randn(3, 2048).to(torch.bfloat16)
    call = Down(hidden, case.down, case.residual, case.down_bias)
    work = down_work(call, find("h100"))
    assert work.launches[0].arguments["SPLIT"] > 1
    plain = F.linear(hidden, case.down, case.down_bias) + case.residual
    exact = reference.down_add(hidden, case.down, case.residual, case.down_bias)
    scale = product_scale(hidden, case.down, case.residual, case.down_bias)
    assert_as_exact(finish(work, hidden), plain, exact, scale)


def test_tokens_in_any_layout() -> None:
    case = draw((5, 4), 32, 48, torch.float32)
    turned = case.x.transpose(0, 1).contiguous().transpose(0, 1)
    wider = torch.randn(5, 4, 40)
    wider[..., :32] = case.residual
    other = replace(case, x=turned, residual=wider[..., :32])
    torch.testing.assert_close(wide(other, SMALL)[1], wide(case, SMALL)[1], rtol=0, atol=1e-6)


ROWS = {
    "expanded": torch.randn(1, 16).expand(5, 16),
    "overlapping": torch.randn(80).as_strided((5, 16), (2, 1)),
    "far apart": torch.empty(2 * FAR + 18)[16:].as_strided((2, 16), (FAR + 1, 1)).fill_(1),  # untouched pages are free
    "one, of a strange stride": torch.randn(20).as_strided((1, 16), (3, 1)),
    "one, every other element": torch.randn(32).as_strided((1, 16), (16, 2)),
    "every other element": torch.randn(5, 32)[:, ::2],
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_a_kernel_cannot_address_are_copied(name: str) -> None:
    """Offsets inside a tile are int32, and a tensor descriptor takes no stride that is below the length of a row."""
    made = _matrix(ROWS[name])
    assert made.stride() == (16, 1)
    assert torch.equal(made, ROWS[name])


def test_rows_that_it_can_address_are_not() -> None:
    wider = torch.randn(5, 40)
    for rows in (wider, wider[:, 8:24], wider[2:3], wider.view(5, 1, 40)[:, :, 8:24]):
        assert _matrix(rows).data_ptr() == rows.data_ptr()


def test_no_tokens_are_no_launches() -> None:
    work, made = wide(draw((0,), 16, 16, torch.bfloat16), SMALL)
    assert work.launches == ()
    assert made.shape == (0, 16)


def test_a_weight_that_every_call_would_copy_is_refused() -> None:
    case = draw((3,), 16, 16, torch.float32)
    turned = replace(case, gate_up=case.gate_up.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(KernelError, match="rows of gate_up must be contiguous"):
        wide(turned, SMALL)
    with pytest.raises(KernelError, match="rows of down must be contiguous"):
        wide(replace(case, down=case.down.T.contiguous().T), SMALL)
    with pytest.raises(KernelError, match="rows of down must be apart"):
        wide(replace(case, down=case.down[:1].expand(16, 16)), SMALL)


@pytest.mark.parametrize(("capability", "dtype"), [(75, torch.float16), (90, torch.float64)])
def test_gpus_and_dtypes_that_are_not_supported_are_named(capability: int, dtype: torch.dtype) -> None:
    gpu = Gpu("Some GPU", capability, 40)
    case = draw((3,), 16, 16, dtype)
    with pytest.raises(KernelError, match="Some GPU is sm_75|not float64"):
        gate_up_work(GateUp(case.x, case.gate_up), gpu)


def test_every_gpu_with_figures_has_tiles() -> None:
    case = draw((3,), 16, 16, torch.bfloat16)
    for gpu in GPUS.values():
        assert gate_up_work(GateUp(case.x, case.gate_up), gpu).launches
