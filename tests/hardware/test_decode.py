"""A decode step by hand, and what must hold of it whatever its constants."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse import Plan
from fxfuse.errors import KernelError
from fxfuse.hardware import released
from fxfuse.hardware.decode import Setting, step
from fxfuse.hardware.gpus import GPUS, find
from fxfuse.hardware.layout import Layout, Part, Shape, planned
from fxfuse.hardware.memory import memory
from fxfuse.hardware.times import Assumptions

H100 = find("h100")
ROUND = replace(H100, bandwidth=1e9, half_flops=1e12, quarter_flops=2e12, memory=1e9)
FREE = Assumptions(bandwidth=1, flops=1, gemm_launch=0, pass_launch=0)
D, WIDTH, VOCABULARY = 1000, 4000, 2000
ATTENTION = Shape("a", "attention", 2_500_000, cache=500, heads=2)
FFN = Shape("f", "ffn", 3 * D * WIDTH, WIDTH, joins=True)
TINY = Layout("tiny", D, VOCABULARY, (Part((ATTENTION,)), Part((FFN,))))


def test_weights_and_cache_by_hand() -> None:
    terms = step(TINY, Setting(ROUND, batch=2, context=100, assume=FREE))
    assert terms.weights == pytest.approx(2 * (2.5e6 + 12e6 + D * VOCABULARY) / 1e9)
    assert terms.cache == pytest.approx(2 * 2 * 100 * 500 / 1e9)
    assert (terms.launches, terms.attention, terms.all_reduces, terms.reductions) == (0, 0, 0, 0)
    # embedding 2d; attention: norm 4d, products 2d + r, two passes of r, r = 2500; FFN: 4d, 2d + R, R, R = 12000;
    # norm 4d, head d + v, sampling 2v
    numbers = 2 * D + (6 * D + 3 * 2500) + (6 * D + 2 * 12000) + 5 * D + 3 * VOCABULARY
    assert terms.activations == pytest.approx(2 * 2 * numbers / 1e9)


def test_starts_by_hand() -> None:
    terms = step(TINY, Setting(ROUND, assume=Assumptions(gemm_launch=1e-3, pass_launch=1e-6)))
    # products: 2 + 2 + head; passes: embedding, two norms, activation, last norm, sampling
    assert terms.launches == pytest.approx(5e-3 + 6e-6)
    assert terms.attention == pytest.approx(1e-3 + 2e-6)
    assert terms.kernels == 14


def test_many_sequences_are_bound_by_their_products() -> None:
    weights = 2.5e6 + 12e6 + D * VOCABULARY
    for precision, peak in (("bfloat16", 1e12), ("float8", 2e12), ("float4", 1e12)):
        terms = step(TINY, Setting(ROUND, batch=10**5, precision=precision, assume=FREE))  # type: ignore[arg-type]
        assert terms.weights == pytest.approx(2 * 10**5 * weights / peak)


def test_gpus_share_weights_and_as_much_of_the_cache_as_there_are_heads() -> None:
    one, eight = (step(TINY, Setting(replace(ROUND, link=9e11), gpus, assume=FREE)) for gpus in (1, 8))
    assert eight.weights == pytest.approx(one.weights / 8)
    assert eight.cache == pytest.approx(one.cache / 2)
    assert eight.reductions == 3  # the attention, the FFN, the logits
    assert eight.all_reduces == pytest.approx(3 * 5.7e-6)


def test_float8_and_float4_read_fewer_bytes() -> None:
    wide, half, least = (
        step(TINY, Setting(ROUND, precision=precision, assume=FREE)).weights
        for precision in ("bfloat16", "float8", "float4")
    )
    assert (half / wide, least / wide) == (pytest.approx(1 / 2), pytest.approx(9 / 32))


@given(
    st.sampled_from([gpu for gpu in GPUS.values() if gpu.link]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 256),
    st.integers(1, 200_000),
)
def test_fusing_saves_starts_and_all_reduces_and_leaves_the_rest(gpu, gpus: int, batch: int, context: int) -> None:
    setting = Setting(gpu, gpus, batch, context)
    before = released.find("nemotron-253b-unfused")
    one, other = step(before, setting), step(planned(before, Plan(parallel=released.fused_groups())), setting)
    assert other.weights == pytest.approx(one.weights)
    assert (other.cache, other.attention) == (one.cache, one.attention)
    assert one.kernels - other.kernels == 45 * 4
    assert one.reductions - other.reductions == (45 if gpus > 1 else 0)
    saved = 45 * (2 * setting.assume.gemm_launch + 2 * setting.assume.pass_launch)
    assert one.launches - other.launches == pytest.approx(saved)
    assert other.seconds < one.seconds


@given(st.sampled_from(released.NAMES), st.integers(1, 255), st.integers(1, 100_000))
def test_more_to_do_takes_no_less_time(name: str, batch: int, context: int) -> None:
    layout, setting = released.find(name), Setting(H100, 8, batch, context)
    least = step(layout, setting).seconds
    assert step(layout, replace(setting, batch=batch + 1)).seconds > least
    assert step(layout, replace(setting, context=context + 1)).seconds > least


def test_a_linear_map_and_streams_of_their_own() -> None:
    setting = Setting(H100, 8)
    linear = step(planned(TINY, Plan(linear=["a"])), setting)
    assert (linear.cache, linear.attention, linear.kernels) == (0, 0, 14 - 6 + 2)
    large = replace(setting, batch=256)
    apart = replace(TINY, parts=(TINY.parts[0], replace(TINY.parts[1], streams=2)))
    assert step(apart, large).all_reduces > step(TINY, large).all_reduces


def test_what_cannot_be_divided_is_refused() -> None:
    odd = Layout("odd", D, VOCABULARY, (Part((Shape("f", "ffn", 3 * D * 4001, 4001),)),))
    with pytest.raises(KernelError, match="hidden units of f, 4001, cannot be divided among 8 GPUs"):
        step(odd, Setting(H100, 8))
    with pytest.raises(KernelError, match="at least 1"):
        Setting(H100, batch=0)


def test_memory_by_hand() -> None:
    need = memory(TINY, Setting(replace(ROUND, memory=1e8), 4))
    weights = 2 * (2.5e6 + 12e6 + 2 * D * VOCABULARY) / 4
    assert need.weights == weights
    assert need.token == 2 * 500 / 2
    assert need.fits
    assert need.tokens == (0.9e8 - weights) // 500
    assert (need.copied, need.spike) == (0, 0)
    tight = memory(TINY, Setting(replace(ROUND, memory=1e6), 4))
    assert (tight.fits, tight.tokens) == (False, 0)
    assert memory(replace(TINY, parts=TINY.parts[1:]), Setting(ROUND)).tokens is None


def test_packing_copies_the_groups_and_once_more_what_the_largest_reads_its_input_with() -> None:
    before = released.find("nemotron-253b-unfused")
    layout = planned(before, Plan(parallel=released.fused_groups()))
    need = memory(layout, Setting(H100, 8, precision="float8"))
    assert need.weights == memory(before, Setting(H100, 8, precision="float8")).weights
    widths = [width for _, width in released.FUSED]
    assert need.copied == pytest.approx(3 * 16384 * sum(widths) / 8)
    assert need.spike == pytest.approx(2 * 16384 * max(widths) / 8)
