"""Part e: every config of the table, and those beside the best, measured for each shape of part c.

What is learnt: rows for `fxfuse/hardware/configs.py`; for `fxfuse/hardware/times.py`, modelled beside measured times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from triton.runtime.errors import OutOfResources

from benchmarks.gpu import ahead
from benchmarks.gpu.bench import Bench, Emit, Row, attempt
from benchmarks.gpu.micro import sizes
from fxfuse.hardware.configs import TABLE, Config, Gemm
from fxfuse.hardware.cost import Layer, gemms
from fxfuse.hardware.times import own_gemm
from fxfuse.kernels.tune import Measure, options, stopwatch

REPLAYS = 7
REHEARSED = 2
"""Shapes that a rehearsal tries, and configs for each."""


def run(bench: Bench, emit: Emit) -> None:
    """One row for each shape: the picked config, the fastest, and what all took."""
    shapes = list(_shapes(bench))[: REHEARSED if bench.rehearsed else None]
    ahead.compile_ahead(bench, (ahead.of_config(bench, *pair) for gemm in shapes for pair in _all(bench, gemm)))
    for gemm in shapes:
        if bench.left < 2:
            emit({"cut": f"from {gemm.kernel} {gemm.M}x{gemm.N}x{gemm.K} on"})
            return
        own: Row = {"kernel": gemm.kernel, "tokens": gemm.M, "N": gemm.N, "K": gemm.K}
        attempt(emit, own, lambda gemm=gemm: _tuned(bench, gemm))


def _shapes(bench: Bench) -> Iterator[Gemm]:
    """Those of part c, few and many tokens first: a cut then leaves both."""
    chosen = sizes(bench)
    order = sorted(chosen.tokens, key=lambda tokens: tokens not in (chosen.tokens[0], 16, chosen.tokens[-1]))
    for tokens in order:
        for d, f, fused in chosen:
            yield from gemms(Layer(d, f, tokens, dtype=bench.dtype), fused)


def _all(bench: Bench, gemm: Gemm) -> Iterator[tuple[Gemm, Config]]:
    """Whatever may be tried for a shape."""
    for config in _options(bench, gemm):
        yield from ((gemm, each) for each in (config, *beside(config)))


def _options(bench: Bench, gemm: Gemm) -> tuple[Config, ...]:
    found = options(gemm, bench.card.gpu)
    return found[:REHEARSED] if bench.rehearsed else found


def _tuned(bench: Bench, gemm: Gemm) -> Row:
    measure = stopwatch(gemm, bench.device, 1 if bench.rehearsed else REPLAYS)
    tried = _options(bench, gemm)
    took = {config: _seconds(measure, config) for config in tried}
    best = min(took, key=took.__getitem__)
    took |= {config: _seconds(measure, config) for config in beside(best) if bench.left > 2}
    modelled = {config: own_gemm(gemm, config, bench.ceilings).seconds for config in took}
    picked, best = tried[0], min(took, key=took.__getitem__)
    return {
        "picked": text(picked),
        "picked us": _us(took[picked]),
        "picked modelled us": _us(modelled[picked]),
        "best": text(best),
        "best us": _us(took[best]),
        "best modelled us": _us(modelled[best]),
        "best row": row_of(gemm, best, bench.card.gpu.arch),
        "all, measured / modelled us": "; ".join(f"{text(c)} {_us(took[c])} / {_us(modelled[c])}" for c in took),
    }


def beside(config: Config) -> tuple[Config, ...]:
    """Configs that differ in one thing: a stage more or less, twice or half the warps."""
    stages = [replace(config, stages=stages) for stages in (config.stages - 1, config.stages + 1) if stages > 1]
    return (*stages, replace(config, warps=12 - config.warps))  # 4 and 8


def _seconds(measure: Measure, config: Config) -> float:
    """Infinite for a config that needs more registers or shared memory than there are."""
    try:
        return measure(config)
    except OutOfResources:
        return float("inf")


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def text(config: Config) -> str:
    loads = " tma" if config.tma else ""
    shares = f" /{config.split}" if config.split > 1 else ""
    return f"{config.rows}x{config.columns}x{config.depth} w{config.warps} s{config.stages}{loads}{shares}"


def row_of(gemm: Gemm, config: Config, arch: int) -> str:
    """The line of `TABLE` that has this config, as it is or would be written; the split is no part of it."""
    whole = replace(config, split=1)
    known = [row for row in TABLE if row.kernel == gemm.kernel and row.config == whole and arch in row.arch]
    tma = ", tma=True" if config.tma else ""
    tile = f"{config.rows}, {config.columns}, {config.depth}, warps={config.warps}, stages={config.stages}{tma}"
    line = f'Row("{gemm.kernel}", ({arch},), {gemm.dtype.itemsize * 8}, {gemm.aligned}, Config({tile})),'
    return line if known else f"{line}  # new"
