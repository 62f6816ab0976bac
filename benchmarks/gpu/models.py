"""Part d: whole models with random weights: what dropping gives, what width gives, what our kernels give.

Each column is a process of its own, so that several compile at once; when all that fit into memory are ready, they are
timed in turn. Decode steps are replays of one CUDA graph, so that nobody's Python is in the numbers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait

import torch
import torch._inductor.compile_fx  # once, before processes are forked
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fxfuse
from benchmarks.gpu.bench import Bench, Emit
from benchmarks.gpu.children import FORK
from fxfuse import Plan
from fxfuse.backend.compiler import ffnfuse
from fxfuse.kernels import clock
from fxfuse.kernels.clock import Timer

ROUNDS, REPLAYS = 3, 5
GROUP = 4
"""FFNs that are fused to one."""


@dataclass(frozen=True)
class Size:
    """A Llama's geometry, on one GPU."""

    name: str
    layers: int
    d: int
    f: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    context: int = 2048
    """Tokens in the cache before a decode step, and in a prompt."""

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.d,
            intermediate_size=self.f,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head,
            vocab_size=self.vocabulary,
            max_position_embeddings=8192,
        )

    @property
    def weight_bytes(self) -> int:
        attention = self.d * self.head * 2 * (self.heads + self.kv_heads)
        return 2 * (self.layers * (attention + 3 * self.d * self.f) + 2 * self.vocabulary * self.d)


LLAMA_8B = Size("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_70B = Size("Llama-3.1-70B, 16 of 80 layers, one GPU's eighth", 16, 8192, 28672 // 8, 8, 1, 128, 128256 // 8)
TINY = Size("tiny", 6, 32, 64, 2, 1, 16, 64, context=16)


def plan(layers: int, fuse: bool) -> Plan:
    """Of the middle half of the layers, three attentions of four are dropped; the FFNs of each four may be one."""
    firsts = range(layers // 4, layers - layers // 4 - GROUP + 1, GROUP)
    groups = [range(first, first + GROUP) for first in firsts]
    return Plan(
        drop=[f"model.layers.{index}.self_attn" for group in groups for index in group[1:]],
        parallel=[[f"model.layers.{index}.mlp" for index in group] for group in groups] if fuse else [],
    )


Compile = Callable[[nn.Module, Size, str], Callable[..., object]]


def _inductor(model: nn.Module, size: Size, inner: str) -> Callable[..., object]:
    return torch.compile(model, backend=inner)


def _unplanned(model: nn.Module, size: Size, inner: str, merge_gate_up: bool) -> Callable[..., object]:
    return torch.compile(model, backend="ffnfuse", options={"inner": inner, "merge_gate_up": merge_gate_up})


def _planned(model: nn.Module, size: Size, inner: str, fuse: bool, kernels: str = "auto") -> Callable[..., object]:
    return fxfuse.apply(model, plan(size.layers, fuse), inner=inner, kernels=kernels)


BASE = "inductor"
COLUMNS: Mapping[str, Compile] = {
    BASE: _inductor,
    "dropped": partial(_planned, fuse=False),
    "dropped and fused": partial(_planned, fuse=True),
    "dropped and fused, aten": partial(_planned, fuse=True, kernels="aten"),
    "merge_gate_up": partial(_unplanned, merge_gate_up=True),
    "no plan": partial(_unplanned, merge_gate_up=False),
}
"""The first ones are those that tell most, if there is no time for all."""


def with_backend() -> None:
    """Let torch know the backend where fxfuse is a checkout that nobody has installed."""
    if "ffnfuse" not in torch.compiler.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(ffnfuse, name="ffnfuse")


def run(bench: Bench, emit: Emit) -> None:
    for size in (TINY,) if bench.rehearsed else (LLAMA_8B, LLAMA_70B):
        begin = time.monotonic()
        names = list(COLUMNS)[:: 2 if bench.rehearsed else 1]
        # Weights, half of them once more as packed copies, caches and activations
        fit = max(1, bench.card.memory // (size.weight_bytes * 3 // 2 + (2 << 30))) if bench.card.memory else 2
        while names and bench.left > 10:
            several, names = names[:fit], names[fit:]
            _compare(bench, emit, size, several)
        if names:
            emit({"cut": f"{size.name}: {', '.join(names)}"})
        if bench.left < (time.monotonic() - begin) / 2:
            break


def _compare(bench: Bench, emit: Emit, size: Size, names: Sequence[str]) -> None:
    """Let columns get ready side by side, then time them in turn."""
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], its = FORK.Pipe()
        processes.append(FORK.Process(target=_column, args=(bench, size, name, its)))
        processes[-1].start()
        its.close()
    try:
        ready = _ready(bench, emit, size, pipes)
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(ROUNDS):
            for name in ready:
                pipes[name].send("time")
                for phase, seconds in pipes[name].recv().items():
                    found.setdefault((name, phase), []).extend(seconds)
        for (name, phase), seconds in found.items():
            ms = round(statistics.median(seconds) * 1e3, 4)
            emit({"model": size.name, "column": name, "phase": phase, "context": size.context, "ms": ms})
    finally:
        for process in processes:
            process.kill()
            process.join()


def _ready(bench: Bench, emit: Emit, size: Size, pipes: Mapping[str, Connection]) -> list[str]:
    """The columns that are ready to be timed; what went wrong with the others is a row."""
    waiting, ready = {pipe: name for name, pipe in pipes.items()}, list[str]()
    while waiting:
        answered = wait(list(waiting), timeout=max(0.0, bench.left - 5))
        if not answered:
            emit({"cut": f"{size.name}: {', '.join(waiting.values())} were still compiling"})
            return ready
        for pipe in answered:
            assert isinstance(pipe, Connection)
            name = waiting.pop(pipe)
            try:
                state = pipe.recv()
            except EOFError:
                state = {"error": "its process died"}
            emit({"model": size.name, "column": name, **state})
            if "error" not in state:
                ready.append(name)
    return ready


def _column(bench: Bench, size: Size, name: str, pipe: Connection) -> None:
    """A process: say that all is compiled, then time each phase whenever asked."""
    begin = time.monotonic()
    try:
        timers = _timers(bench, size, name)
        peak = 0 if bench.rehearsed else torch.cuda.max_memory_allocated()
        pipe.send({"ready after s": round(time.monotonic() - begin, 1), "GiB": round(peak / 2**30, 1)})
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"[:1000]})
        return
    with torch.no_grad():
        while pipe.recv():
            pipe.send({phase: [once() for _ in range(REPLAYS)] for phase, once in timers.items()})


@torch.no_grad()
def _timers(bench: Bench, size: Size, name: str) -> dict[str, Timer]:
    """Each phase, compiled."""
    with_backend()
    torch.manual_seed(0)
    torch._dynamo.config.automatic_dynamic_shapes = False  # a prompt is compiled for its own length, by everybody
    torch._inductor.config.compile_threads = 4  # several processes compile
    torch.set_default_dtype(torch.bfloat16)
    with bench.device:
        model = LlamaForCausalLM(size.config).eval().requires_grad_(False)
        ids = torch.randint(size.vocabulary, (1, size.context))
        program = COLUMNS[name](model, size, bench.inner)
        cache = _filled(size, bench.device)
    decode = partial(program, input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    prefill = partial(program, input_ids=ids, use_cache=False, logits_to_keep=1)
    return {
        "decode": clock.timer([decode], bench.device),
        "prefill": clock.timer([prefill], bench.device, captured=False),
    }


def _filled(size: Size, device: torch.device) -> StaticCache:
    """A cache that holds ``context`` random tokens, with room for those that are timed."""
    cache = StaticCache(size.config, max_cache_len=size.context + 64)
    cache.early_initialization(1, size.kv_heads, size.head, torch.bfloat16, device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(size.context)
    return cache
