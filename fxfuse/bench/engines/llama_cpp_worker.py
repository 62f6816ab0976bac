"""One model in llama.cpp: reads requests from stdin, a line of JSON each, and answers them on stdout.

    LLAMA_PYTHON llama_cpp_worker.py FILE SETTINGS

Run by :mod:`fxfuse.bench.engines.process`, whose ``Settings`` it is given as JSON, by the Python that has
llama-cpp-py-sync, which need not have fxfuse. The first line it says is what it has loaded, or why it has not. A
request has ``begin``, a list of prompts (lists of tokens), which are read one after the other until each has a first
token, or ``go_on``, how many tokens more to make of each, a step for all of them at a time. The answer has all tokens
that were made since ``begin``, chosen greedily, how many ``seconds`` it took, and for how many CPU seconds this process
was ``busy``. A request that also has ``logits``, the path of a file, begins anew and is answered with no tokens: the
file gets the logits after each token of the prompts, ``[tokens, vocabulary]`` of all of them end to end. Keys and
values are float32, so that nothing but weights is rounded.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SHIM = Path(sys.prefix, "lib", "isoc23.so")
"""What a C library older than 2.38 lacks, if somebody put it there."""

F32 = 0
"""``GGML_TYPE_F32``."""


class Engine:
    """A model of llama.cpp, and the sequences that it computes at a time."""

    def __init__(self, path: str, room: int, sequences: int, threads: int) -> None:
        if SHIM.exists():
            ctypes.CDLL(str(SHIM), ctypes.RTLD_GLOBAL)
        import numpy
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.np, self._ffi, self._lib = numpy, get_ffi(), get_lib()
        self._lib.llama_backend_init()
        model = self._lib.llama_model_load_from_file(path.encode(), self._lib.llama_model_default_params())
        if model == self._ffi.NULL:
            raise RuntimeError("it is no GGUF file, or of an architecture that this llama.cpp does not know")
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = room * sequences, sequences, False
        params.n_batch = params.n_ubatch = max(room, sequences)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = F32
        params.flash_attn_type = 0
        self._model, self._context = model, self._lib.llama_init_from_model(model, params)
        self.vocabulary = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(model)))
        self._made = list[list[int]]()
        self._done = list[int]()

    def description(self) -> str:
        """Architecture, size and type, as llama.cpp has it."""
        text = self._ffi.new("char[256]")
        self._lib.llama_model_desc(self._model, text, 256)
        return f"llama.cpp, {self._ffi.string(text).decode()}"

    def begin(self, prompts: list[list[int]]) -> list[list[int]]:
        """Forget the sequences that are there, and read prompts until each has a token."""
        self._clear(len(prompts))
        for row, prompt in enumerate(prompts):
            logits = self._read([(row, token) for token in prompt])
            self._made.append([int(logits[-1].argmax())])
        return self._made

    def go_on(self, count: int) -> list[list[int]]:
        """Make so many tokens more of each."""
        for _ in range(count):
            logits = self._read([(row, made[-1]) for row, made in enumerate(self._made)], every=True)
            for made, row in zip(self._made, logits, strict=True):
                made.append(int(row.argmax()))
        return self._made

    def logits(self, prompts: list[list[int]]) -> Any:
        """Logits after each token of the prompts, end to end."""
        self._clear(len(prompts))
        held = [self._read([(row, token) for token in prompt], every=True) for row, prompt in enumerate(prompts)]
        return self.np.concatenate(held)

    def _clear(self, sequences: int) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._made, self._done = [], [0] * sequences

    def _read(self, tokens: list[tuple[int, int]], every: bool = False) -> Any:
        """Logits after each of ``tokens``, pairs of sequence and token, or after the last alone."""
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, (row, token) in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, self._done[row]
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
            batch.logits[place] = every or place == len(tokens) - 1
            self._done[row] += 1
        if self._lib.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        self._lib.llama_batch_free(batch)
        places = range(len(tokens)) if every else [len(tokens) - 1]
        return self.np.stack([self._row(self._lib.llama_get_logits_ith(self._context, place)) for place in places])

    def _row(self, pointer: Any) -> Any:
        return self.np.frombuffer(self._ffi.buffer(pointer, 4 * self.vocabulary), self.np.float32).copy()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp prints, too
    file, settings = sys.argv[1], json.loads(sys.argv[2])
    threads = settings["threads"] or os.cpu_count() or 1

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        model = Engine(file, settings["room"], settings["sequences"], threads)
    except (ImportError, OSError) as error:  # the latter of the library itself
        return say({"missing": str(error), "python": sys.executable})
    except RuntimeError as error:
        return say({"refused": str(error)})
    say({"description": model.description(), "vocabulary": model.vocabulary,
         "holds": settings["room"] * settings["sequences"]})  # fmt: skip
    for line in sys.stdin:
        asked = json.loads(line)
        began, busy = time.perf_counter(), time.process_time()
        if "logits" in asked:
            model.np.save(asked["logits"], model.logits(asked["begin"]))
            made: list[list[int]] = []
        else:
            made = model.begin(asked["begin"]) if "begin" in asked else model.go_on(asked["go_on"])
        say({"tokens": made, "seconds": time.perf_counter() - began, "busy": time.process_time() - busy})
    return None


if __name__ == "__main__":
    main()
