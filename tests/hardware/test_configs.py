"""The table of tiles, and what is picked from it for any shape."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.errors import KernelError
from fxfuse.hardware.configs import COUNTERS, CROWD, MAX_SPLIT, TABLE, Config, Gemm, candidates, reach
from fxfuse.hardware.gpus import GPUS, Gpu, figures, find
from fxfuse.hardware.pick import STEPS, pick
from fxfuse.hardware.times import own_gemm

H100 = find("h100")

gemms = st.builds(
    Gemm,
    kernel=st.sampled_from(["gate_up", "down"]),
    M=st.one_of(st.integers(1, 130), st.integers(1, 8192)),
    N=st.integers(1, 300_000),
    K=st.integers(1, 300_000),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    aligned=st.booleans(),
)
gpus = st.sampled_from(list(GPUS.values()))


def unsplit(config: Config) -> Config:
    return replace(config, split=1)


@given(gemms, gpus)
def test_a_pick_is_of_the_table(gemm: Gemm, gpu: Gpu) -> None:
    config = pick(gemm, gpu)
    assert unsplit(config) in candidates(gemm, gpu.arch)
    assert gemm.aligned or not config.tma


@given(gemms, gpus)
def test_only_down_is_split_and_every_program_gets_some_steps(gemm: Gemm, gpu: Gpu) -> None:
    config = pick(gemm, gpu)
    if config.split > 1:
        assert gemm.kernel == "down"
        assert config.split <= MAX_SPLIT
        assert config.tiles(gemm) <= COUNTERS
        assert config.tiles(gemm) * config.split <= CROWD * gpu.multiprocessors
        assert math.ceil(gemm.K / config.depth) / config.split >= STEPS


@given(gemms, gpus)
def test_few_tokens_read_no_weight_more_than_twice(gemm: Gemm, gpu: Gpu) -> None:
    tallest = max(config.rows for config in candidates(gemm, gpu.arch))
    if min(tallest, 64) >= gemm.M:
        assert math.ceil(gemm.M / pick(gemm, gpu).rows) <= 2


@given(gemms, gpus)
def test_no_tile_that_reads_as_rarely_is_modelled_to_be_faster(gemm: Gemm, gpu: Gpu) -> None:
    config = pick(gemm, gpu)
    same = [other for other in candidates(gemm, gpu.arch) if other.rows == config.rows]
    assert all(own_gemm(gemm, config, gpu).seconds <= own_gemm(gemm, other, gpu).seconds for other in same)


def test_of_equals_the_largest_tile_is_picked() -> None:
    gemm = Gemm("gate_up", 1, 57344, 4096, torch.bfloat16)
    larger, smaller = [config for config in candidates(gemm, 90) if config.rows == 16]
    assert own_gemm(gemm, larger, H100).seconds == own_gemm(gemm, smaller, H100).seconds
    assert pick(gemm, H100) == larger


@pytest.mark.parametrize("row", TABLE, ids=lambda row: str(TABLE.index(row)))
def test_every_config_is_picked_by_some_shape(row) -> None:
    """A config that nothing picks is dead weight, unless it is there for `tune` to try."""
    dtype = torch.float32 if row.bits == 32 else torch.bfloat16
    shapes = (
        Gemm(row.kernel, M, N, 16384, dtype, row.aligned)
        for M in (1, 16, 32, 64, 96, 128, 256, 512, 1024, 2048, 8192)
        for N in (256, 576, 1024, 2048, 4096, 8192, 28672, 212_992)
    )
    gpus = [gpu for gpu in GPUS.values() if gpu.arch in row.arch]
    assert any(unsplit(pick(shape, gpu)) == row.config for shape in shapes for gpu in gpus)


def test_a_last_wave_that_is_nearly_empty_is_avoided() -> None:
    # 128 tiles of 128 x 256 are one wave of 132; 256 of 128 x 128 would be two.
    assert pick(Gemm("down", 2048, 2048, 8192, torch.bfloat16), H100).columns == 256
    # 144 would be two waves, the second nearly empty; split, they are more, and less is idle.
    gemm = Gemm("down", 2048, 2304, 8192, torch.bfloat16)
    waves = own_gemm(gemm, pick(gemm, H100), H100).waves
    assert math.ceil(waves) / waves < 1.2 < math.ceil(144 / 132) / (144 / 132)


def test_a_deep_down_with_few_tokens_is_split() -> None:
    config = pick(Gemm("down", 1, 2048, 4 * 8192, torch.bfloat16), H100)
    assert config.split > 1
    assert config.tiles(Gemm("down", 1, 2048, 4 * 8192, torch.bfloat16)) * config.split >= H100.multiprocessors


def test_a_deep_down_with_some_tokens_is_split_in_large_tiles() -> None:
    # Large tiles leave most of 108 multiprocessors idle; the smaller ones that fill them are half as fast.
    gemm = Gemm("down", 128, 4096, 4 * 14336, torch.bfloat16)
    config = pick(gemm, find("a100"))
    assert config.rows * config.columns >= 128 * 128
    assert config.tiles(gemm) < 108 <= config.tiles(gemm) * config.split


def test_a_split_in_large_tiles_costs_what_its_last_program_reads() -> None:
    gemm, config = Gemm("down", 128, 4096, 4 * 14336, torch.bfloat16), Config(128, 256, 64, warps=8, stages=3)
    seconds = [own_gemm(gemm, replace(config, split=split), H100).seconds for split in (8, 16)]
    assert seconds[1] - seconds[0] > 8 * 128 * 256 * 4 / 109e9  # a multiprocessor draws 64 bytes a cycle at most


def test_reach_grows_with_the_tile() -> None:
    assert reach(64, 64) < reach(128, 64) < reach(128, 128) < reach(128, 256) == 1


@pytest.mark.parametrize(
    ("capability", "arch"), [(80, 80), (86, 86), (87, 80), (89, 86), (90, 90), (100, 80), (120, 86)]
)
def test_newer_gpus_run_what_fits_them(capability: int, arch: int) -> None:
    assert Gpu("some", capability, 100).arch == arch


@pytest.mark.parametrize(
    ("name", "capability", "like"),
    [
        ("NVIDIA A100-SXM4-80GB", 80, "a100"),
        ("NVIDIA H200", 90, "h200"),
        ("NVIDIA H100 80GB HBM3", 90, "h100"),
        ("NVIDIA RTX A6000", 86, "a6000"),
        ("NVIDIA GeForce RTX 4090", 89, "a10"),
        ("NVIDIA GH200 480GB", 90, "h100"),
        ("NVIDIA B200", 100, "a100"),
    ],
)
def test_a_gpu_without_figures_takes_those_of_its_architecture(name: str, capability: int, like: str) -> None:
    known = figures(Gpu(name, capability, 100))
    assert known == replace(find(like), name=name, capability=capability, multiprocessors=100)


def test_what_is_not_supported_is_named() -> None:
    gemm = Gemm("down", 1, 16, 16, torch.bfloat16)
    with pytest.raises(KernelError, match="T4 is sm_75"):
        pick(gemm, Gpu("T4", 75, 40))
    with pytest.raises(KernelError, match="not float64"):
        pick(replace(gemm, dtype=torch.float64), H100)
    with pytest.raises(KernelError, match="a100, a10, a6000"):
        find("tpu")
