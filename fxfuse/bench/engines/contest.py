"""The time to the first token, and to each after it, of models in engines that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from fxfuse.bench.engines.process import Engine
from fxfuse.bench.timing import AGAIN, ORIGINAL, Samples, interleave
from fxfuse.errors import EngineError

FIRST, NEXT = "first token", "next token"
"""The phases: a prompt is read and a token made; one more token is made of each sequence."""


@dataclass(frozen=True)
class Requests:
    """What all engines are asked.

    Attributes:
        batch: prompts at a time.
        length: tokens of each prompt.
        tokens: that are made after the first, to time one of them.
    """

    batch: int = 1
    length: int = 256
    tokens: int = 16

    @property
    def room(self) -> int:
        """Tokens of a sequence in the end."""
        return self.length + self.tokens + 1

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
    engines: Mapping[str, Engine],
    requests: Requests,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = False,
) -> Contest:
    """Time all engines by turns, in the phases :data:`FIRST` and :data:`NEXT`.

    The time of a next token is that of ``requests.tokens + 1`` tokens less that of one, which was asked for in the same
    round, divided.

    Args:
        engines: by the names of the contestants, in the order in which they run.
        requests: what they are asked.
        rounds: how often.
        clock: seconds.
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

    def asked(engine: Engine, tokens: int) -> Callable[[], object]:
        return lambda: engine.generate(prompts, tokens)

    counts = 1, requests.tokens + 1
    calls = {f"{count} {name}": asked(engine, count) for name, engine in engines.items() for count in counts}
    taken = interleave(calls, rounds, 0.0, clock, f"batch {requests.batch}" if progress else "").seconds
    first, whole = ({name: taken[f"{count} {name}"] for name in engines} for count in counts)
    step = {
        name: tuple((long - short) / requests.tokens for long, short in zip(whole[name], first[name], strict=True))
        for name in engines
    }
    descriptions = {name: engine.served.description for name, engine in engines.items()}
    return Contest(descriptions, requests, {FIRST: Samples(first), NEXT: Samples(step)})
