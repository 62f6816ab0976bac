from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
import torch

import fxfuse._common.progress
from fxfuse.bench.timing import Machine, Samples, clock_of, interleave


class Clock:
    """Time that passes only when a function says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, durations: Iterator[float]) -> Callable[[], None]:
        def function() -> None:
            self.now += next(durations)

        return function


def lasting(seconds: float) -> Iterator[float]:
    return (seconds for _ in count())


def test_the_functions_run_in_turn() -> None:
    order: list[str] = []

    interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, min_seconds=0)

    assert order[-6:] == ["a", "b", "b", "a", "a", "b"]


def test_a_sample_is_seconds_per_call_however_often_it_had_to_be_called() -> None:
    clock = Clock()

    samples = interleave(
        {"short": clock.taking(lasting(0.001)), "long": clock.taking(lasting(0.5))},
        4,
        min_seconds=0.1,
        clock=clock,
    )

    assert samples.median("short") == pytest.approx(0.001)
    assert samples.median("long") == pytest.approx(0.5)
    assert len(samples.seconds["short"]) == len(samples.seconds["long"]) == 4
    assert clock.now == pytest.approx((2 + 4 * 100) * 0.001 + (2 + 4) * 0.5)


def test_the_first_call_which_compiles_is_not_in_the_samples() -> None:
    clock = Clock()
    durations = iter([100.0, *[0.25] * 6])

    samples = interleave({"compiled": clock.taking(durations)}, repeats=5, min_seconds=0.1, clock=clock)

    assert set(samples.seconds["compiled"]) == {0.25}


def test_at_least_one_round() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        interleave({}, repeats=0)


def test_a_drift_of_the_machine_cancels_in_the_ratio() -> None:
    drifting = [1.0, 1.5, 2.0, 3.0, 9.0]
    samples = Samples({"a": tuple(drifting), "b": tuple(0.8 * time for time in drifting)})

    assert samples.ratio("b", "a") == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("second", "void"), [(1.0, False), (1.014, False), (0.986, False), (1.016, True), (0.984, True)]
)
def test_a_run_is_void_when_two_copies_of_one_program_differ(second: float, void: bool) -> None:
    samples = Samples({"a": (1.0,) * 3, "again": (second,) * 3})

    assert samples.void("a", "again") is void


def test_the_machine_says_what_the_numbers_depend_on() -> None:
    machine = str(Machine.here())

    assert f"torch {torch.__version__}" in machine
    assert f"{torch.get_num_threads()} threads" in machine


def test_the_clock_of_a_cpu_advances() -> None:
    clock = clock_of(torch.device("cpu"))

    assert clock() < clock()


def test_first_calls_show_that_they_live_and_rounds_write_nothing_in_between(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fxfuse._common.progress, "EVERY", 0.05)
    begun: list[int] = []

    def compiling() -> None:
        time.sleep(0.0 if begun else 0.2)
        begun.append(threading.active_count())

    threads = threading.active_count()
    interleave({"a": compiling}, repeats=20, min_seconds=0.0, progress="decode")

    first, *_ = capsys.readouterr().err.splitlines()
    assert first == "decode: first calls, which compile: 0 of 1 programs, 0:00"
    assert begun == [threads + 1] * 2 + [threads] * 20  # who writes in between is gone when the rounds begin
