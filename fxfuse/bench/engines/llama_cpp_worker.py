"""One model in llama.cpp: reads requests from stdin, a line of JSON each, and answers them on stdout.

    LLAMA_PYTHON llama_cpp_worker.py FILE SETTINGS

Run by :mod:`fxfuse.bench.engines.process`, whose ``Settings`` it is given as JSON, by the Python that has
llama-cpp-py-sync, which need not have fxfuse. The first line it says is what it has loaded, or why it has not. A
request has ``prompts`` (lists of tokens) and ``tokens``, how many to generate for each; the answer has those tokens,
chosen greedily. A request that has the path of a file, ``logits``, instead is answered with none: the file gets the
logits after each token of the prompts, ``[tokens, vocabulary]`` of all of them end to end. Prompts are read one after
the other. Keys and values are float32, so that nothing but weights is rounded. An answer says for how many CPU seconds
this process was ``busy``.
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
    """A model of llama.cpp and one sequence."""

    def __init__(self, path: str, room: int, threads: int) -> None:
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
        params.n_ctx = params.n_batch = params.n_ubatch = room
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = F32
        params.flash_attn_type = 0
        self._model, self._context = model, self._lib.llama_init_from_model(model, params)
        self.vocabulary = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(model)))
        self._done = 0

    def description(self) -> str:
        """Architecture, size and type, as llama.cpp has it."""
        text = self._ffi.new("char[256]")
        self._lib.llama_model_desc(self._model, text, 256)
        return f"llama.cpp, {self._ffi.string(text).decode()}"

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
        return self.np.stack([self._row(self._lib.llama_get_logits_ith(self._context, place)) for place in places])

    def _row(self, pointer: Any) -> Any:
        return self.np.frombuffer(self._ffi.buffer(pointer, 4 * self.vocabulary), self.np.float32).copy()

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
    file, settings = sys.argv[1], json.loads(sys.argv[2])
    threads = settings["threads"] or os.cpu_count() or 1

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        model = Engine(file, settings["room"], threads)
    except (ImportError, OSError) as error:  # the latter of the library itself
        return say({"missing": str(error), "python": sys.executable})
    except RuntimeError as error:
        return say({"refused": str(error)})
    say({"description": model.description(), "vocabulary": model.vocabulary,
         "holds": settings["room"] * settings["sequences"]})  # fmt: skip
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.process_time()
        if "logits" in asked:
            held = [model.logits(prompt) for prompt in asked["prompts"]]
            model.np.save(asked["logits"], model.np.concatenate(held))
            made: list[list[int]] = []
        else:
            made = [model.greedy(prompt, asked["tokens"]) for prompt in asked["prompts"]]
        say({"tokens": made, "busy": time.process_time() - began})
    return None


if __name__ == "__main__":
    main()
