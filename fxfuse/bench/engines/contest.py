"""The time to the first token, and to each after it, of models in engines that take turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from fxfuse._common.progress import bar
from fxfuse.bench.engines.process import Answer, Engine
from fxfuse.bench.timing import AGAIN, ORIGINAL, Samples
from fxfuse.errors import EngineError

FIRST, NEXT = "first token", "next token"
"""The phases: all prompts are read until each has a token; one more token is made of each sequence."""


@dataclass(frozen=True)
class Requests:
    """What all engines are asked.

    Attributes:
        batch: prompts at a time.
        length: tokens of each prompt.
        tokens: that are made after the first at a stretch, to time one of them.
        stretches: of so many tokens after each prompt.
    """

    batch: int = 1
    length: int = 256
    tokens: int = 16
    stretches: int = 1

    @property
    def room(self) -> int:
        """Tokens of a sequence in the end; the prompt that was read first has got some while others were read."""
        return self.length + self.batch + self.tokens * self.stretches

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """As many prompts, that differ, of tokens below ``vocabulary``; the first tokens are often special ones."""
        low = min(100, vocabulary // 2)
        return [
            [(7 * row + 3 * place) % (vocabulary - low) + low for place in range(self.length)]
            for row in range(self.batch)
        ]


@dataclass(frozen=True)
class Contest:
    """Engines that were timed by turns: `ORIGINAL`, `AGAIN`, and others.

    Attributes:
        descriptions: what each engine says of its model.
        requests: what they were asked.
        phases: seconds of each, by phase.
    """

    descriptions: Mapping[str, str]
    requests: Requests
    phases: Mapping[str, Samples]

    @property
    def void(self) -> list[str]:
        """The phases in which the two copies of the original differ too much for the run to mean anything."""
        return [phase for phase, samples in self.phases.items() if samples.void(ORIGINAL, AGAIN)]

    def as_dict(self) -> dict[str, object]:
        """What JSON shows: seconds of every round, medians, ratios to the original."""
        phases = [
            {"phase": phase, "void": phase in self.void, "programs": samples.as_dict(ORIGINAL)}
            for phase, samples in self.phases.items()
        ]
        return {"engines": dict(self.descriptions), "requests": asdict(self.requests), "phases": phases}


def contest(
    engines: Mapping[str, Engine], requests: Requests, rounds: int, busy: bool = False, progress: bool = False
) -> Contest:
    """Time all engines by turns, in the phases :data:`FIRST` and :data:`NEXT`.

    In a round each engine reads the prompts, one engine after the other; then each makes a stretch of tokens, and so on
    until all stretches are made. The order is turned round each time.

    Args:
        engines: by the names of the contestants, in the order in which they run.
        requests: what they are asked.
        rounds: how often.
        busy: count CPU seconds of the engines instead of the time that passes.
        progress: show on stderr how far it is.

    Raises:
        EngineError: an engine has no room for the requests, or fails.
    """
    for name, engine in engines.items():
        if engine.served.holds < requests.batch * requests.room:
            raise EngineError(
                f"{name!r} has room for {engine.served.holds} tokens, and {requests.batch} sequences of "
                f"{requests.room} need more: ask for fewer or shorter ones; vLLM on CPUs takes as many GiB as the "
                "environment variable VLLM_CPU_KVCACHE_SPACE says"
            )
    prompts = requests.prompts(min(engine.served.vocabulary for engine in engines.values()))
    warm(engines, prompts, progress)

    def seconds(answer: Answer) -> float:
        return answer.busy if busy else answer.seconds

    first: dict[str, list[float]] = {name: [] for name in engines}
    step: dict[str, list[float]] = {name: [] for name in engines}
    orders = list(engines), list(engines)[::-1]  # so that nobody always runs after the same one, or last
    with bar(f"batch {requests.batch}: timing", "rounds", rounds, progress, still=True) as advance:
        for round_ in range(rounds):
            for name in orders[round_ % 2]:
                first[name].append(seconds(engines[name].begin(prompts)))
            for stretch in range(requests.stretches):
                for name in orders[(round_ + stretch + 1) % 2]:
                    step[name].append(seconds(engines[name].go_on(requests.tokens)) / requests.tokens)
            advance(1)
    descriptions = {name: engine.served.description for name, engine in engines.items()}
    held = {FIRST: first, NEXT: step}
    phases = {phase: Samples({name: tuple(taken[name]) for name in engines}) for phase, taken in held.items()}
    return Contest(descriptions, requests, phases)


def warm(engines: Mapping[str, Engine], prompts: list[list[int]], progress: bool) -> None:
    """Let all engines answer once, so that no compilation is in the times."""
    with bar(f"batch {len(prompts)}: first calls", "models", len(engines), progress) as advance:
        for engine in engines.values():
            engine.begin(prompts)
            engine.go_on(1)
            advance(1)
