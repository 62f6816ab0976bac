"""Kernels compiled before they are needed, on all cores: Triton would compile them one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.children import side_by_side
from fxfuse.hardware.configs import COUNTERS, LOOP_ROWS, Config, Gemm
from fxfuse.kernels import down, gate_up
from fxfuse.kernels.calls import Down, GateUp
from fxfuse.kernels.compile import warm
from fxfuse.kernels.launch import down_work, gate_up_work, wide_work
from fxfuse.kernels.launches import Launch

EPS = 1e-6
SECONDS = 25.0


def compile_ahead(bench: Bench, launches: Iterable[Launch]) -> None:
    """Fill Triton's cache on disk. CUDA is not started; where kernels are interpreted, there is nothing to do."""
    if bench.rehearsed:
        return
    different = {_key(launch): launch for launch in launches}
    jobs = [partial(warm, launch, bench.card.gpu.capability) for launch in different.values()]
    side_by_side(jobs, min(SECONDS, bench.left / 2))


def of_ops(bench: Bench, d: int, width: int, tokens: int) -> list[Launch]:
    """What the three ops launch for an FFN without biases."""
    gpu, x = bench.card.gpu, _meta(bench, tokens, d)
    first = GateUp(x, _meta(bench, 2, width, d), eps=EPS)
    second = Down(_meta(bench, tokens, width), _meta(bench, d, width), x)
    works = gate_up_work(first, gpu), down_work(second, gpu), wide_work(first, second.weight, x, None, gpu)
    return [launch for work in works for launch in work.launches]


def of_config(bench: Bench, gemm: Gemm, config: Config) -> Launch:
    """What a stopwatch of `fxfuse.kernels.tune` launches."""
    x, out = _meta(bench, gemm.M, gemm.K), _meta(bench, gemm.M, gemm.N)
    counters = torch.empty(COUNTERS, dtype=torch.int32, device="meta")
    if gemm.kernel == "down":
        return down.launch(Down(x, _meta(bench, gemm.N, gemm.K), out), config, out, counters)
    call = GateUp(x, _meta(bench, 2, gemm.N, gemm.K), eps=EPS)
    if config.rows > LOOP_ROWS:
        factors = torch.empty(gemm.M, device="meta")
        call = GateUp(x, call.weight, rstd=factors)
    return gate_up.launch(call, config, out, counters)


def _meta(bench: Bench, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=bench.dtype, device="meta")


def _key(launch: Launch) -> tuple[object, ...]:
    """What Triton compiles a kernel of its own for. Sizes are multiples of 16 here, and tell none apart."""
    given = launch.arguments.items()
    fixed = tuple((name, value) for name, value in given if (name.isupper() and name not in _SIZES) or value is None)
    return launch.kernel, launch.warps, launch.stages, fixed


_SIZES = {"M", "N", "K", "F"}
