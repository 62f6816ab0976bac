"""A model in an engine, in a process of its own, run by that engine's Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORKERS = {
    "vllm": Path(__file__).with_name("vllm_worker.py"),
    "llama.cpp": Path(__file__).with_name("llama_cpp_worker.py"),
}

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all in one process
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
"""What workers are started with."""


class Engine:
    """Answers requests; the process sleeps in between. ``busy`` are its CPU seconds in them so far."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log, self.busy = process, log, 0.0

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """The tokens that follow each prompt, chosen greedily."""
        return self._ask({"prompts": prompts, "tokens": tokens})

    def write_logits(self, prompts: Sequence[Sequence[int]], path: Path) -> None:
        """Write to a .npy file the logits after each token of the prompts. llama.cpp alone can."""
        self._ask({"prompts": prompts, "logits": str(path)})

    def _ask(self, request: Mapping[str, object]) -> list[list[int]]:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self.answer()
        self.busy += answer["busy"]
        made: list[list[int]] = answer["tokens"]
        return made

    def answer(self) -> dict[str, Any]:
        """The next line of the process."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine has ended:\n{self._log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def engine(name: str, python: str, arguments: Sequence[str], log: Path, threads: int | None = None) -> Iterator[Engine]:
    """Start an engine with a model, and wait until it can answer.

    Args:
        name: of the engine.
        python: the Python that has it.
        arguments: of its worker: the folder, and what else it takes.
        log: gets what it prints.
        threads: how many it computes with; all cores by default.
    """
    command = [python or sys.executable, str(WORKERS[name]), *arguments]
    alone = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as told, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told, text=True,
        env={**os.environ, **ENVIRONMENT, **alone},
    ) as process:  # fmt: skip
        try:
            made = Engine(process, log)
            made.answer()
            yield made
        finally:
            process.kill()
