from __future__ import annotations

from collections.abc import Sequence

import pytest

from fxfuse.bench.engines.contest import FIRST, NEXT, Requests, contest
from fxfuse.bench.engines.process import Engine, Served
from fxfuse.bench.timing import AGAIN, ORIGINAL
from fxfuse.errors import EngineError


class Clock:
    """Time that passes when somebody says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Steady(Engine):
    """Takes a second for a prompt, and as long for each token as it was told."""

    def __init__(self, clock: Clock, step: float, holds: int = 10_000, vocabulary: int = 1000) -> None:
        self.clock, self.step, self.asked = clock, step, list[tuple[Sequence[Sequence[int]], int]]()
        self.served = Served(f"steady {step}", vocabulary, holds)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        self.clock.now += 1 + self.step * tokens
        self.asked.append((prompts, tokens))
        return [[0] * tokens for _ in prompts]


def test_a_next_token_is_what_more_tokens_take_longer() -> None:
    clock = Clock()
    engines = {ORIGINAL: Steady(clock, 0.5), AGAIN: Steady(clock, 0.5), "export": Steady(clock, 0.25)}

    done = contest(engines, Requests(batch=2, length=5, tokens=4), 3, clock)

    assert done.phases[FIRST].seconds == {ORIGINAL: (1.5,) * 3, AGAIN: (1.5,) * 3, "export": (1.25,) * 3}
    assert done.phases[NEXT].seconds == {ORIGINAL: (0.5,) * 3, AGAIN: (0.5,) * 3, "export": (0.25,) * 3}
    assert done.phases[NEXT].ratio("export", ORIGINAL) == 0.5
    assert done.void == []
    assert {tokens for _, tokens in engines["export"].asked} == {1, 5}


def test_a_phase_in_which_the_original_differs_from_itself_is_void() -> None:
    clock = Clock()

    done = contest({ORIGINAL: Steady(clock, 0.01), AGAIN: Steady(clock, 0.02)}, Requests(tokens=4), 3, clock)

    assert done.void == [NEXT]
    phases = done.as_dict()["phases"]
    assert isinstance(phases, list)
    assert [phase["void"] for phase in phases] == [False, True]
    assert done.as_dict()["engines"] == {ORIGINAL: "steady 0.01", AGAIN: "steady 0.02"}


@pytest.mark.parametrize("vocabulary", [2, 150, 50_000])
def test_prompts_are_of_tokens_that_all_engines_know_and_differ(vocabulary: int) -> None:
    clock = Clock()
    engines = {ORIGINAL: Steady(clock, 1.0, vocabulary=60_000), AGAIN: Steady(clock, 1.0, vocabulary=vocabulary)}

    contest(engines, Requests(batch=3, length=40), 1, clock)

    prompts, _ = engines[ORIGINAL].asked[0]
    assert [len(prompt) for prompt in prompts] == [40] * 3
    assert all(0 <= token < vocabulary for prompt in prompts for token in prompt)
    assert vocabulary == 2 or len({tuple(prompt) for prompt in prompts}) == 3


def test_what_has_no_room_is_refused_and_not_timed_with_preemptions() -> None:
    clock = Clock()
    engines = {ORIGINAL: Steady(clock, 1.0), "export": Steady(clock, 1.0, holds=8 * 27 - 1)}

    with pytest.raises(EngineError, match="'export' has room for 215 tokens, and 8 sequences of 27 need more"):
        contest(engines, Requests(batch=8, length=10, tokens=16), 1, clock)

    assert engines[ORIGINAL].asked == []
