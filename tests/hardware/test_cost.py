"""The cost model: what must hold whatever its assumptions, and numbers done by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.errors import KernelError
from fxfuse.hardware.configs import Config
from fxfuse.hardware.cost import ALL_REDUCE_SECONDS, Layer, fused, gemms, pays, roofline, sequential
from fxfuse.hardware.gpus import GPUS, find
from fxfuse.hardware.pick import pick
from fxfuse.hardware.times import Assumptions, ideal, library_gemm, own_gemm

H100 = find("h100")

layers = st.builds(
    lambda d, f, tokens, gpus, dtype: Layer(16 * d, 128 * f, tokens, gpus, dtype),
    d=st.integers(1, 1024),
    f=st.integers(1, 416),
    tokens=st.integers(1, 8192),
    gpus=st.sampled_from([1, 8]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)


@given(layers, st.integers(1, 8), st.sampled_from(list(GPUS.values())))
def test_nothing_is_faster_than_the_roofline(layer: Layer, count: int, gpu) -> None:
    floor = roofline(layer, count, gpu)
    assert fused(layer, count, gpu).seconds > floor
    assert sequential(layer, count, gpu).seconds > floor


@given(layers, st.integers(1, 8))
def test_fusing_keeps_the_flops_and_moves_fewer_bytes(layer: Layer, count: int) -> None:
    before, after = sequential(layer, count, H100), fused(layer, count, H100)
    assert after.flops == before.flops == count * 6 * layer.tokens * layer.d * layer.width // layer.tensor_parallel
    assert after.bytes <= before.bytes
    assert before.launches == 4 * count
    assert after.launches in (2, 3)


@given(layers, st.integers(1, 8))
def test_all_reduces_are_one_for_the_whole_group(layer: Layer, count: int) -> None:
    parallel = layer.tensor_parallel > 1
    assert sequential(layer, count, H100).all_reduces == count * parallel
    assert fused(layer, count, H100).all_reduces == parallel


def test_a_decode_step_by_hand() -> None:
    layer = Layer(d=16384, width=53248, tokens=1)
    weights = 2 * 3 * 16384 * 53248
    ideal = Assumptions(bandwidth=1, flops=1, join=0, gemm_launch=0, pass_launch=0)
    assert fused(layer, 1, H100, ideal).seconds == pytest.approx(weights / 3.35e12, rel=2e-3)
    launched = Assumptions(bandwidth=1, flops=1, join=0, gemm_launch=1e-6, pass_launch=1e-7)
    assert fused(layer, 1, H100, launched).seconds == pytest.approx(weights / 3.35e12 + 2e-6, rel=2e-3)
    assert sequential(layer, 1, H100, launched).seconds == pytest.approx(weights / 3.35e12 + 2.2e-6, rel=2e-3)


def test_a_full_wave_runs_at_the_assumed_rate() -> None:
    # 132 tiles of 128 x 2 * 128: one wave; its FLOPs at 0.7 of the peak
    layer = Layer(d=16384, width=128 * 132, tokens=128)
    one = Assumptions(bandwidth=1e9, own=1, gemm_launch=0, pass_launch=0)
    made = fused(layer, 1, H100, one)
    gate_up = 2 * 128 * 2 * 128 * 132 * 16384 / (0.7 * 989.4e12)
    down = gate_up / 2
    assert gate_up + down <= made.seconds <= gate_up + 2 * down


def test_all_reduces_are_read_off_the_table_and_between() -> None:
    ideal = Assumptions(bandwidth=1e9, flops=1e9, join=0, gemm_launch=0, pass_launch=0)

    def seconds(tokens: int) -> float:
        return fused(Layer(2048, 1024, tokens, 8), 1, H100, ideal).seconds

    assert seconds(1) == pytest.approx(ALL_REDUCE_SECONDS[4096], rel=1e-3)  # 4096 bytes
    assert seconds(256) == pytest.approx(ALL_REDUCE_SECONDS[1_048_576], rel=1e-3)
    assert ALL_REDUCE_SECONDS[262_144] < seconds(100) < ALL_REDUCE_SECONDS[524_288]
    assert seconds(65536) == pytest.approx(65536 * 4096 / 257e9, rel=1e-3)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(KernelError, match="divisible"):
        Layer(4096, 14337, 1, 8)
    with pytest.raises(KernelError, match="positive"):
        Layer(0, 16, 1)


def test_a_kernel_by_hand() -> None:
    # 256 tiles on 132 multiprocessors are two waves, at 0.9 of 0.7 of the peak
    gemm, config = gemms(Layer(2048, 16384, 4096), 1)[1], Config(128, 256, 64, warps=8, stages=3, tma=True)
    wave = 2 * 128 * 256 * 16384 / (0.9 * 0.7 * 989.4e12 / 132)
    assert own_gemm(gemm, config, H100).seconds == pytest.approx(2 * wave + 4e-6)
    assert own_gemm(gemm, config, H100, Assumptions(own=0.45)).seconds == pytest.approx(4 * wave + 4e-6)
    assert library_gemm(gemm, H100).seconds == pytest.approx(2 * wave * 0.9 + 4e-6)


def test_too_few_bytes_on_the_way_cost_bandwidth() -> None:
    gemm = gemms(Layer(4096, 14336, 1), 4)[0]
    deep, shallow = (Config(16, 16, 16, warps=4, stages=stages) for stages in (8, 2))
    no_wait = Assumptions(latency=1e-15)
    assert own_gemm(gemm, deep, H100).seconds < own_gemm(gemm, shallow, H100).seconds
    assert own_gemm(gemm, deep, H100, no_wait).seconds == own_gemm(gemm, shallow, H100, no_wait).seconds


@given(layers, st.integers(1, 8), st.sampled_from(list(GPUS.values())))
def test_no_gemm_is_faster_than_the_hardware(layer: Layer, count: int, gpu) -> None:
    for gemm in gemms(layer, count):
        assert ideal(gemm, gpu) < own_gemm(gemm, pick(gemm, gpu), gpu).seconds
        assert ideal(gemm, gpu) < library_gemm(gemm, gpu).seconds


def test_one_ffn_pays_by_its_launches_and_not_where_products_are_what_limits() -> None:
    assert pays(Layer(4096, 14336, 1), H100)
    assert pays(Layer(4096, 14336, 32), H100)
    assert not pays(Layer(4096, 14336, 4096), H100)
    assert pays(Layer(4096, 14336, 4096), H100, Assumptions(own=1))
