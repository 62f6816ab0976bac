from __future__ import annotations

from collections.abc import Sequence

import pytest

from fxfuse.bench.engines.contest import FIRST, NEXT, Requests, contest
from fxfuse.bench.engines.process import Answer, Engine, Served
from fxfuse.bench.timing import AGAIN, ORIGINAL
from fxfuse.errors import EngineError


class Steady(Engine):
    """Takes a second for each prompt, and as long for each token as it was told; its CPU twice as long."""

    def __init__(self, step: float, holds: int = 10_000, vocabulary: int = 1000, log: list[str] | None = None) -> None:
        self.step, self.asked, self.log = step, list[Sequence[Sequence[int]]](), [] if log is None else log
        self.served = Served(f"steady {step}", vocabulary, holds)

    def begin(self, prompts: Sequence[Sequence[int]]) -> Answer:
        self.asked.append(prompts)
        self.log.append(f"{self.step} begin")
        return self.answer(len(prompts) + self.step)

    def go_on(self, tokens: int) -> Answer:
        self.log.append(f"{self.step} {tokens}")
        return self.answer(self.step * tokens)

    def answer(self, seconds: float) -> Answer:
        return Answer([[0]], seconds, 2 * seconds)


@pytest.mark.parametrize("busy", [False, True])
def test_the_first_tokens_and_the_ones_after_them_are_timed_apart(busy: bool) -> None:
    engines = {ORIGINAL: Steady(0.5), AGAIN: Steady(0.5), "export": Steady(0.25)}

    done = contest(engines, Requests(batch=2, length=5, tokens=4, stretches=2), 3, busy)

    scale = 2 if busy else 1
    assert done.phases[FIRST].seconds == {name: (scale * (2 + engine.step),) * 3 for name, engine in engines.items()}
    assert done.phases[NEXT].seconds == {name: (scale * engine.step,) * 6 for name, engine in engines.items()}
    assert done.phases[NEXT].ratio("export", ORIGINAL) == 0.5
    assert done.void == []


def test_engines_take_turns_after_a_first_call_and_nobody_is_always_first() -> None:
    log: list[str] = []

    contest({ORIGINAL: Steady(1, log=log), AGAIN: Steady(2, log=log)}, Requests(tokens=4, stretches=2), 2)

    first_calls = ["1 begin", "1 1", "2 begin", "2 1"]
    one = ["1 begin", "2 begin", "2 4", "1 4", "1 4", "2 4"]
    other = ["2 begin", "1 begin", "1 4", "2 4", "2 4", "1 4"]
    assert log == first_calls + one + other


def test_a_phase_in_which_the_original_differs_from_itself_is_void() -> None:
    done = contest({ORIGINAL: Steady(0.01), AGAIN: Steady(0.02)}, Requests(tokens=4), 3)

    assert done.void == [NEXT]
    phases = done.as_dict()["phases"]
    assert isinstance(phases, list)
    assert [phase["void"] for phase in phases] == [False, True]
    assert done.as_dict()["engines"] == {ORIGINAL: "steady 0.01", AGAIN: "steady 0.02"}


@pytest.mark.parametrize("vocabulary", [2, 150, 50_000])
def test_prompts_are_of_tokens_that_all_engines_know_and_differ(vocabulary: int) -> None:
    engines = {ORIGINAL: Steady(1.0, vocabulary=60_000), AGAIN: Steady(1.0, vocabulary=vocabulary)}

    contest(engines, Requests(batch=3, length=40), 1)

    prompts = engines[ORIGINAL].asked[0]
    assert [len(prompt) for prompt in prompts] == [40] * 3
    assert all(0 <= token < vocabulary for prompt in prompts for token in prompt)
    assert vocabulary == 2 or len({tuple(prompt) for prompt in prompts}) == 3


def test_what_has_no_room_is_refused_and_not_timed_with_preemptions() -> None:
    engines = {ORIGINAL: Steady(1.0), "export": Steady(1.0, holds=8 * 34 - 1)}

    with pytest.raises(EngineError, match="'export' has room for 271 tokens, and 8 sequences of 34 need more"):
        contest(engines, Requests(batch=8, length=10, tokens=16), 1)

    assert engines[ORIGINAL].asked == []
