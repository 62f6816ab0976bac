"""Part c: each kernel and the whole wide FFN, beside the same in ATen under inductor, max-autotune and Liger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import ahead
from benchmarks.gpu.ahead import EPS
from benchmarks.gpu.bench import Bench, Emit, Row, Value, attempt
from fxfuse.hardware import times
from fxfuse.hardware.cost import Layer, gemms, roofline
from fxfuse.kernels import clock, tune

OPS = torch.ops.fxfuse
Program: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of tokens ``[M, d]``, hidden units ``[M, F]``, gate and up ``[2, F, d]`` and down ``[d, F]``."""

OURS, THEIRS = "fxfuse", "inductor"


@dataclass(frozen=True)
class Sizes:
    """Geometries ``(d, f)`` on one GPU, numbers of FFNs that are fused, numbers of tokens."""

    geometries: tuple[tuple[int, int], ...]
    fused: tuple[int, ...]
    tokens: tuple[int, ...]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return ((d, f, fused) for fused in self.fused for d, f in self.geometries)


# f of the larger two on one of eight GPUs: 28672 / 8 and 53248 / 8
SIZES = Sizes(((4096, 14336), (8192, 3584), (2048, 8192), (16384, 6656)), (4, 1), (1, 4, 16, 64, 256, 2048))
TINY = Sizes(((32, 64),), (2, 1), (1, 16))
MANY = 256
"""Tokens from which on fewer replays will do."""


def sizes(bench: Bench) -> Sizes:
    return TINY if bench.rehearsed else SIZES


def gate_up(x: Tensor, hidden: Tensor, weight: Tensor, down: Tensor) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], eps=EPS)
    gate, up = F.linear(normed, weight.flatten(0, 1)).chunk(2, -1)
    return F.silu(gate) * up


def down_add(x: Tensor, hidden: Tensor, weight: Tensor, down: Tensor) -> Tensor:
    return x + F.linear(hidden, down)


def ffn(x: Tensor, hidden: Tensor, weight: Tensor, down: Tensor) -> Tensor:
    return down_add(x, gate_up(x, hidden, weight, down), weight, down)


def own_ffn(x: Tensor, hidden: Tensor, weight: Tensor, down: Tensor) -> Tensor:
    return OPS.wide_ffn(x, weight, down, x, eps=EPS)


KERNELS: dict[str, tuple[Program, Program]] = {
    "K1": (lambda x, hidden, weight, down: OPS.gate_up_act(x, weight, eps=EPS), gate_up),
    "K2": (lambda x, hidden, weight, down: OPS.down_add(hidden, down, x), down_add),
    "FFN": (own_ffn, ffn),
}
"""Ours and plain torch's."""


@dataclass(frozen=True)
class Point:
    """Weights of ``fused`` FFNs of width ``f`` as one, several copies of them, and a number of tokens."""

    bench: Bench
    d: int
    f: int
    fused: int
    tokens: int
    weights: list[tuple[Tensor, Tensor]]

    def calls(self, program: Program) -> list[clock.Call]:
        x, hidden = self.random(self.tokens, self.d), self.random(self.tokens, self.f * self.fused)
        return clock.repeated([partial(program, x, hidden, *pair) for pair in self.weights])

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.bench.dtype, device=self.bench.device)

    def measure(self, kernel: str, program: Program) -> Row:
        """Time, rates, and the share of what the ceilings allow."""
        with torch.no_grad():
            replays = 10 if self.tokens >= MANY else 20
            seconds = clock.seconds(self.calls(program), self.bench.device, replays=replays)
        layer, ceilings = Layer(self.d, self.f, self.tokens, dtype=self.bench.dtype), self.bench.ceilings
        pair = dict(zip(("K1", "K2"), gemms(layer, self.fused), strict=True))
        own = [gemm for name, gemm in pair.items() if kernel in (name, "FFN")]
        work = [times.own_gemm(gemm, tune.chosen(gemm, self.bench.card.gpu), ceilings) for gemm in own]
        floor = roofline(layer, self.fused, ceilings) if len(own) == 2 else times.ideal(own[0], ceilings)
        return {
            "us": round(seconds * 1e6, 2),
            "GB/s": round(sum(each.bytes for each in work) / seconds / 1e9, 1),
            "TFLOP/s": round(sum(each.flops for each in work) / seconds / 1e12, 2),
            "of ceiling": round(floor / seconds, 3),
        }

    def row(self, kernel: str, by: str) -> dict[str, Value]:
        own = {"d": self.d, "f": self.f, "fused": self.fused, "tokens": self.tokens}
        return {**own, "kernel": kernel, "by": by}


def run(bench: Bench, emit: Emit) -> None:
    """The sweep first; then training, and max-autotune as long as there is time."""
    chosen = sizes(bench)
    launches = (
        each for d, f, n in chosen for tokens in chosen.tokens for each in ahead.of_ops(bench, d, n * f, tokens)
    )
    ahead.compile_ahead(bench, launches)
    plain = {name: torch.compile(theirs, backend=bench.inner, dynamic=True) for name, (_, theirs) in KERNELS.items()}
    for d, f, fused in chosen:
        weights = draw(bench, d, f * fused)
        for tokens in chosen.tokens:
            point = Point(bench, d, f, fused, tokens, weights)
            for kernel, (ours, _) in KERNELS.items():
                if bench.left < 3:
                    emit({"cut": f"from d {d}, f {f}, {fused} fused, {tokens} tokens on"})
                    return
                attempt(emit, point.row(kernel, OURS), partial(point.measure, kernel, ours))
                attempt(emit, point.row(kernel, THEIRS), partial(point.measure, kernel, plain[kernel]))
    d, f = chosen.geometries[0]
    _train(bench, emit, d, f)
    _autotuned(bench, emit, d, f)


def draw(bench: Bench, d: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """Gate and up, and down, as many copies as keep the smaller one out of the L2 cache."""
    made = {"dtype": bench.dtype, "device": bench.device}
    count = clock.copies(width * d * bench.dtype.itemsize, bench.device)
    return [
        (torch.randn(2, width, d, **made).div_(d**0.5), torch.randn(d, width, **made).div_(width**0.5))
        for _ in range(count)
    ]


def liger_ffn(x: Tensor, hidden: Tensor, weight: Tensor, down: Tensor) -> Tensor:
    """The same FFN as Liger trains it: its SwiGLU kernel between cuBLAS's GEMMs."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = (F.linear(F.rms_norm(x, x.shape[-1:], eps=EPS), each) for each in weight)
    return x + F.linear(LigerSiLUMulFunction.apply(gate, up), down)


def _train(bench: Bench, emit: Emit, d: int, f: int) -> None:
    """Forward and backward of one FFN, to tokens and weights."""
    tokens = sizes(bench).tokens[-1]
    contestants: dict[str, Program] = {OURS: own_ffn, THEIRS: torch.compile(ffn, backend=bench.inner)}
    if find_spec("liger_kernel") is None:
        emit({"note": "Liger is not installed"})
    elif not bench.rehearsed:
        contestants["Liger"] = liger_ffn
    point = Point(bench, d, f, 1, tokens, draw(bench, d, f)[:1])
    leaves = [point.random(tokens, d), *point.weights[0]]
    gradient = point.random(tokens, d)

    def measure(program: Program) -> Row:
        x, *weights = (leaf.detach().requires_grad_() for leaf in leaves)

        def step() -> object:
            return torch.autograd.grad(program(x, x, *weights), (x, *weights), gradient)

        return {"us": round(clock.seconds(clock.repeated([step]), bench.device, captured=False) * 1e6, 2)}

    for by, program in contestants.items():
        attempt(emit, point.row("FFN, forward and backward", by), partial(measure, program))


def _autotuned(bench: Bench, emit: Emit, d: int, f: int) -> None:
    """Inductor's own search for the best GEMM: most of a minute for each number of tokens."""
    options = None if bench.rehearsed else {"max_autotune": True, "max_autotune_gemm_backends": "ATEN,TRITON"}
    weights, needed = draw(bench, d, f * 4), 40.0
    for tokens in (sizes(bench).tokens[index] for index in (0, -1)):
        if bench.left < needed:
            emit({"note": f"no time for max-autotune with {tokens} tokens"})
            continue
        begin = time.monotonic()
        tuned = torch.compile(ffn, backend=bench.inner, dynamic=False, options=options)
        point = Point(bench, d, f, 4, tokens, weights)
        attempt(emit, point.row("FFN", "max-autotune"), partial(point.measure, "FFN", tuned))
        needed = 1.5 * (time.monotonic() - begin)
