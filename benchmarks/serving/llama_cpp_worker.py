"""One model in llama.cpp: reads requests from stdin, a line of JSON each, and answers them on stdout.

    LLAMA_PYTHON benchmarks/serving/llama_cpp_worker.py FOLDER [THREADS]

Run by the Python that has llama-cpp-py-sync, which need not have fxfuse. A request has ``prompts`` (lists of tokens)
and ``tokens``, how many to generate for each; the answer has those tokens, chosen greedily. A request that has the path
of a file, ``logits``, instead is answered with none: the file gets the logits after each token of the prompts,
``[tokens, vocabulary]`` of all of them end to end. Keys and values are float32, so that nothing but weights is
rounded. An answer says for how many CPU seconds this process was ``busy``.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SHIM = Path(sys.prefix, "lib", "isoc23.so")
"""What an older C library lacks; ``old_glibc.py`` puts it there."""

ROOM = 512
"""Tokens of a sequence."""

F32 = 0
"""``GGML_TYPE_F32``."""


class Engine:
    """A model of llama.cpp and one sequence."""

    def __init__(self, path: str, threads: int) -> None:
        if SHIM.exists():
            ctypes.CDLL(str(SHIM), ctypes.RTLD_GLOBAL)
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self._ffi, self._lib = get_ffi(), get_lib()
        self._lib.llama_backend_init()
        model = self._lib.llama_model_load_from_file(path.encode(), self._lib.llama_model_default_params())
        if model == self._ffi.NULL:
            raise SystemExit(f"llama.cpp does not load {path}")
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = ROOM
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = F32
        params.flash_attn_type = 0
        self._context = self._lib.llama_init_from_model(model, params)
        self._vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(model))
        self._done = 0

    def clear(self) -> None:
        """Begin a new sequence."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._done = 0

    def read(self, tokens: list[int], every: bool = False) -> Any:
        """Logits after each of ``tokens``, or after the last alone: ``[rows, vocabulary]``."""
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, self._done + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = every or place == len(tokens) - 1
        if self._lib.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        self._lib.llama_batch_free(batch)
        self._done += len(tokens)
        places = range(len(tokens)) if every else [len(tokens) - 1]
        return np.stack([self._row(self._lib.llama_get_logits_ith(self._context, place)) for place in places])

    def _row(self, pointer: Any) -> Any:
        return np.frombuffer(self._ffi.buffer(pointer, 4 * self._vocabulary), np.float32).copy()

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The tokens that follow the prompt."""
        self.clear()
        logits, made = self.read(prompt), list[int]()
        while len(made) < count:
            made.append(int(logits[-1].argmax()))
            if len(made) < count:
                logits = self.read(made[-1:])
        return made

    def logits(self, prompt: list[int]) -> Any:
        """Logits after each token of the prompt."""
        self.clear()
        return self.read(prompt, every=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp prints, too
    folder, *rest = sys.argv[1:]
    model = Engine(str(Path(folder, "model.gguf")), int(rest[0]) if rest else os.cpu_count() or 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.process_time()
        if "logits" in asked:
            np.save(asked["logits"], np.concatenate([model.logits(prompt) for prompt in asked["prompts"]]))
            made: list[list[int]] = []
        else:
            made = [model.greedy(prompt, asked["tokens"]) for prompt in asked["prompts"]]
        told = {"tokens": made, "busy": time.process_time() - began}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
