"""A model in an engine, in a process of its own, run by that engine's Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxfuse.errors import EngineError, MissingDependencyError, nearest

WORKERS = {
    "vllm": Path(__file__).with_name("vllm_worker.py"),
    "llama.cpp": Path(__file__).with_name("llama_cpp_worker.py"),
}
"""What runs in the process, by the name of the engine."""

PACKAGES = {"vllm": "vllm", "llama.cpp": "llama-cpp-py-sync"}
"""The distributions that the workers import."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all in one process
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    # Large pages, and memory that is not given back in between: else two copies of a model differ by 3 to 7% on a CPU.
    "THP_MEM_ALLOC_ENABLE": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296",
}
"""What workers are started with, where the environment says nothing else."""


@dataclass(frozen=True)
class Settings:
    """How an engine computes.

    Attributes:
        implementation: of vLLM, whose code computes layers: "vllm", "transformers", or "auto".
        compiled: let vLLM compile, too.
        dtype: of vLLM, "auto" or a dtype; a GGUF file has types of its own.
        room: tokens of a sequence, at most.
        sequences: at a time, at most.
        memory: of vLLM, the share of the device's memory that it may take; several engines are there at once.
        threads: how many it computes with; all cores by default.
        plan: of vLLM, the file of a plan that it applies to the folder while it loads that.
    """

    implementation: str = "auto"
    compiled: bool = False
    dtype: str = "auto"
    room: int = 512
    sequences: int = 32
    memory: float = 0.2
    threads: int | None = None
    plan: str | None = None


@dataclass(frozen=True)
class Served:
    """What an engine says of the model that it has loaded.

    Attributes:
        description: engine, version, and how it computes the model.
        vocabulary: how many tokens it knows.
        holds: how many tokens of all sequences have room at a time.
    """

    description: str
    vocabulary: int
    holds: int


@dataclass(frozen=True)
class Answer:
    """What an engine says to a request.

    Attributes:
        tokens: that were made after each prompt so far, chosen greedily; those that were read first have some more.
        seconds: that the request took, and nothing of the way to the process and back.
        busy: CPU seconds of the process meanwhile.
    """

    tokens: Sequence[Sequence[int]]
    seconds: float
    busy: float


class Engine:
    """Answers requests; the process sleeps in between."""

    def __init__(self, name: str, model: Path, sequences: int, process: subprocess.Popen[str], log: Path) -> None:
        self._name, self._model, self._sequences, self._process, self._log = name, model, sequences, process, log
        told = self._answer()
        if "missing" in told:
            raise MissingDependencyError(
                f"{told['python']} has no {name} ({told['missing']}): name the Python that has it (--python), or pip "
                f"install {PACKAGES[name]} there"
            )
        if "refused" in told:
            raise EngineError(f"{name} does not load {str(model)!r}: {told['refused']}")
        self.served = Served(told["description"], told["vocabulary"], told["holds"])

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """The tokens that follow each prompt, chosen greedily: at least one. There may be more prompts than sequences.

        Raises:
            EngineError: the engine has failed, and ended.
        """
        made: list[list[int]] = []
        for start in range(0, len(prompts), self._sequences):
            done = self.begin(prompts[start : start + self._sequences])
            if tokens > 1:
                done = self.go_on(tokens - 1)
            made += [list(each[:tokens]) for each in done.tokens]
        return made

    def begin(self, prompts: Sequence[Sequence[int]]) -> Answer:
        """Read prompts, in place of those before, until each has a first token.

        Raises:
            EngineError: the engine has failed, and ended.
        """
        return self._ask({"begin": prompts})

    def go_on(self, tokens: int) -> Answer:
        """Make so many tokens more after each prompt.

        Raises:
            EngineError: the engine has failed, and ended; or a sequence has no room for them.
        """
        return self._ask({"go_on": tokens})

    def write_logits(self, prompts: Sequence[Sequence[int]], path: Path) -> None:
        """Write to a .npy file the logits after each token of the prompts. llama.cpp alone can."""
        self._ask({"begin": prompts, "logits": str(path)})

    def _ask(self, request: Mapping[str, object]) -> Answer:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and `_answer` says so
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return Answer(**self._answer())

    def _answer(self) -> dict[str, Any]:
        """The next line of the process."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(
                f"{self._name} with {str(self._model)!r} has ended, exit code {self._process.wait()}; its last words: "
                f"{self._log.read_text(errors='replace')[-1500:] or 'none'}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def serving(
    engine: str, model: Path, log: Path, python: str | os.PathLike[str] = "", settings: Settings = Settings()
) -> Iterator[Engine]:
    """Start an engine with a model, and wait until it can answer.

    Args:
        engine: its name, a key of :data:`WORKERS`.
        model: a folder, or a GGUF file, or a folder that has ``model.gguf``.
        log: gets what it prints.
        python: the Python that has it; by default this one.
        settings: how it computes.

    Raises:
        EngineError: there is no such engine, model or Python; or the engine does not load the model.
        MissingDependencyError: that Python does not have the engine.
    """
    if engine not in WORKERS:
        raise EngineError(f"unknown engine {engine!r}{nearest(engine, WORKERS)}")
    path = _checkpoint(engine, model)
    threads = settings.threads
    alone = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [os.fspath(python) or sys.executable, str(WORKERS[engine]), str(path), json.dumps(asdict(settings))]
    with log.open("w") as told:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told, text=True,
                env={**ENVIRONMENT, **os.environ, **alone},
            )  # fmt: skip
        except OSError as error:
            raise EngineError(f"{command[0]!r} is no Python that can be run: {error.strerror}") from error
    try:
        yield Engine(engine, model, settings.sequences, process, log)
    finally:
        process.kill()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # what was asked last was not read any more
            process.stdin.close()
        process.stdout.close()
        process.wait()


def _checkpoint(engine: str, model: Path) -> Path:
    """What the worker is to load."""
    if not model.exists():
        raise EngineError(f"there is no {str(model)!r}")
    if engine == "llama.cpp":
        path = model / "model.gguf" if model.is_dir() else model
        if not path.is_file():
            raise EngineError(f"{str(model)!r} is no GGUF file, and no folder that has a model.gguf")
        return path
    if not (model / "config.json").is_file():
        raise EngineError(f"{str(model)!r} is no folder of a model for {engine}: it has no config.json")
    return model
