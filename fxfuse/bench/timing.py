"""Honest latencies: the contestants run in turn, and one of them runs twice.

On a machine that is not idle the speed drifts by more than what is to be measured. So the functions are timed
interleaved (A, B, B, A, ...), compared round by round, and the baseline has a second, separately compiled copy: where
the two copies differ by more than `A_A_LIMIT`, the run is void.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxfuse._common.progress import bar
from fxfuse._torch.dynamo import backend_named, raising
from fxfuse._torch.pytree import tree_leaves
from fxfuse.errors import FxfuseError

if TYPE_CHECKING:
    from fxfuse.data.loading import Loaded
    from fxfuse.plan import Plan

ORIGINAL, AGAIN, PLANNED = "original", "original again", "planned"
"""The contestants of `compare`, in the order in which they run."""

A_A_LIMIT = 0.015
"""Relative difference between two copies of one program above which a run measured the machine and not the programs."""


@dataclass(frozen=True)
class Samples:
    """Seconds per call: one entry per round for each function, all in the order in which they ran."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over the rounds of time(name) / time(base): a drift that lasts longer than a round cancels."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(time / base_time for time, base_time in pairs)

    def as_dict(self, base: str) -> dict[str, dict[str, object]]:
        """What JSON shows: seconds of every round, medians, ratios to ``base``."""
        return {
            name: {"median_seconds": self.median(name), "to_original": self.ratio(name, base), "seconds": seconds}
            for name, seconds in self.seconds.items()
        }

    def void(self, first: str, second: str, limit: float = A_A_LIMIT) -> bool:
        """Whether two copies of one program differ by more than ``limit``, in either direction."""
        return abs(self.ratio(second, first) - 1) > limit


def interleave(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    min_seconds: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
    progress: str = "",
) -> Samples:
    """Time every function once a round, in the given order and back again by turns, for ``repeats`` rounds.

    Args:
        functions: what to time, by name. Each is called twice beforehand, so compilation is not in the numbers.
        repeats: rounds, at least 1.
        min_seconds: a sample repeats its call until it lasts about this long, so short calls are not lost in the
            resolution of the clock.
        clock: seconds; it must only return once the work is done (see `clock_of` for a GPU).
        progress: what is timed, to show on stderr how far it is; nothing is shown if empty.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    calls = {}
    with bar(f"{progress}: first calls, which compile", "programs", len(functions), bool(progress)) as advance:
        for name, function in functions.items():
            function()
            calls[name] = max(1, round(min_seconds / max(_timed(function, 1, clock), 1e-9)))
            advance(1)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions.items())
    with bar(f"{progress}: timing", "rounds", repeats, bool(progress), still=True) as advance:
        for _ in range(repeats):
            for name, function in order:
                seconds[name].append(_timed(function, calls[name], clock))
            order.reverse()  # so that nobody always runs after the same one, or last in a round
            advance(1)
    return Samples({name: tuple(values) for name, values in seconds.items()})


@dataclass(frozen=True)
class Comparison:
    """A model as it is, twice, and as a plan leaves it, on one example call.

    Attributes:
        phase: what the call stands for: prefill, decode, or any call.
        samples: of `ORIGINAL`, `AGAIN` and `PLANNED`.
        distance: of the outputs, ``|planned - original| / |original|`` over all their elements.
    """

    phase: str
    samples: Samples
    distance: float

    @property
    def void(self) -> bool:
        """Whether the two copies of the original differ too much for the run to mean anything."""
        return self.samples.void(ORIGINAL, AGAIN)

    def as_dict(self) -> dict[str, object]:
        """What JSON shows: seconds of every round, medians, ratios to the original."""
        programs = self.samples.as_dict(ORIGINAL)
        return {"phase": self.phase, "void": self.void, "output_distance": self.distance, "programs": programs}


def compare(
    phase: str,
    case: Loaded,
    plan: Plan | None,
    repeats: int,
    inner: str = "inductor",
    min_seconds: float = 0.05,
    prepack: bool = False,
    progress: bool = False,
) -> Comparison:
    """Compile the model of ``case`` with ``inner``, twice, and with ffnfuse under ``plan``; time its example call.

    ``prepack`` is the option of the backend; ``progress`` shows on stderr how far it is.

    Raises:
        FxfuseError: whatever ffnfuse has to say about the plan.
    """
    torch.compiler.reset()
    options = {"inner": inner, "prepack": prepack} | ({} if plan is None else {"plan": plan})
    compiled = {
        ORIGINAL: torch.compile(case.model, backend=inner, dynamic=False),
        AGAIN: torch.compile(case.model, backend=_another(inner), dynamic=False),
        # torch annotates options more narrowly than it treats them: it hands any value on to the backend.
        PLANNED: torch.compile(case.model, backend="ffnfuse", options=options, dynamic=False),  # type: ignore[arg-type]
    }
    calls = {name: _call(program, case) for name, program in compiled.items()}
    device = next((p.device for p in case.model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        with raising(FxfuseError), bar(f"{phase}: compiling", "programs", 2, progress) as advance:
            planned = calls[PLANNED]()
            advance(1)
            distance = relative_distance(planned, calls[ORIGINAL]())
        samples = interleave(calls, repeats, min_seconds, clock_of(device), phase if progress else "")
    return Comparison(phase, samples, distance)


def relative_distance(outputs: object, reference: object) -> float:
    """``|outputs - reference| / |reference|`` over the floating-point tensors of two nested structures, in float64."""
    pairs = list(zip(_floats(outputs), _floats(reference), strict=True))
    apart = sum((a - b).square().sum().item() for a, b in pairs)
    return float((apart / max(sum(b.square().sum().item() for _, b in pairs), 1e-300)) ** 0.5)


def to_json(machine: Machine, comparisons: Sequence[Comparison]) -> str:
    """The whole run: the machine, and each comparison with all its samples."""
    runs = [comparison.as_dict() for comparison in comparisons]
    return json.dumps({"machine": asdict(machine), "comparisons": runs}, indent=2)


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock that waits for the work queued on ``device``."""
    if device.type == "cpu":
        return time.perf_counter

    def synchronized() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return synchronized


@dataclass(frozen=True)
class Machine:
    """What a latency depends on besides the program."""

    cpu: str
    device: str
    threads: int
    load: float
    torch: str

    @classmethod
    def here(cls) -> Machine:
        """This machine now; ``load`` is the mean number of runnable processes over the last minute."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)  # None on a CUDA build without a GPU
        device = (
            torch.cuda.get_device_name() if accelerator and accelerator.type == "cuda" else str(accelerator or "cpu")
        )
        return cls(_cpu_name(), device, torch.get_num_threads(), os.getloadavg()[0], torch.__version__)

    def __str__(self) -> str:
        return f"{self.cpu}, {self.device}, {self.threads} threads, load {self.load:.2f}, torch {self.torch}"


def _call(program: Callable[..., object], case: Loaded) -> Callable[[], object]:
    return lambda: program(*case.args, **case.kwargs)


def _another(inner: str) -> Callable[[fx.GraphModule, list[torch.Tensor]], Callable[..., object]]:
    """The same compiler under another identity: Dynamo reuses a compilation only for the same backend object."""
    compiler = backend_named(inner)

    def backend(gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., object]:
        return compiler(gm, example_inputs)

    return backend


def _floats(outputs: object) -> list[torch.Tensor]:
    leaves = tree_leaves(outputs)
    return [leaf.double() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _timed(function: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        function()
    return (clock() - start) / calls


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
