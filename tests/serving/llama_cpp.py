"""llama.cpp as a function of token ids: run by the Python of an environment that has llama-cpp-py-sync, not by ours.

``python llama_cpp.py MODEL.gguf REQUEST.json ANSWER.npz``. The request holds ``prompts`` (lists of ids), ``new`` (how
many tokens to add to them, greedily), ``text`` (ids of which to return all logits) and ``threads``. Keys and values are
float32, so that nothing but the weights is rounded.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

FFI, LIB = get_ffi(), get_lib()

F32 = 0
"""``GGML_TYPE_F32``."""


class Engine:
    """A model of llama.cpp with room for so many tokens."""

    def __init__(self, path: str, room: int, threads: int = 1) -> None:
        LIB.llama_backend_init()
        self._model = LIB.llama_model_load_from_file(path.encode(), LIB.llama_model_default_params())
        if self._model == FFI.NULL:
            raise SystemExit(f"llama.cpp does not load {path}")
        params = LIB.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = room
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = F32
        params.flash_attn_type = 0
        self._context = LIB.llama_init_from_model(self._model, params)
        self._vocabulary = LIB.llama_vocab_n_tokens(LIB.llama_model_get_vocab(self._model))
        self._done = 0

    def clear(self) -> None:
        """Begin a new sequence."""
        LIB.llama_memory_clear(LIB.llama_get_memory(self._context), True)
        self._done = 0

    def read(self, tokens: list[int], every: bool = False) -> np.ndarray[Any, Any]:
        """Logits after the last of ``tokens``, ``[vocabulary]``; or after each of them, ``[len(tokens), vocabulary]``."""
        batch = LIB.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, self._done + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = every or place == len(tokens) - 1
        if LIB.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        LIB.llama_batch_free(batch)
        self._done += len(tokens)
        places = range(len(tokens)) if every else [len(tokens) - 1]
        rows = [self._row(LIB.llama_get_logits_ith(self._context, place)) for place in places]
        return np.stack(rows) if every else rows[0]

    def _row(self, pointer: Any) -> np.ndarray[Any, Any]:
        return np.frombuffer(FFI.buffer(pointer, 4 * self._vocabulary), np.float32).copy()

    def greedy(self, prompt: list[int], new: int) -> list[int]:
        """The prompt and the tokens that follow it."""
        self.clear()
        tokens, logits = list(prompt), self.read(prompt)
        while len(tokens) < len(prompt) + new:
            tokens.append(int(logits.argmax()))
            logits = self.read(tokens[-1:])
        return tokens


def main(path: str, request_path: str, answer_path: str) -> None:
    with open(request_path) as file:
        request = json.load(file)
    text, prompts, new = request["text"], request["prompts"], request["new"]
    room = max([len(text), *(len(prompt) + new for prompt in prompts)])
    engine = Engine(path, room, request.get("threads", 1))
    answers = {f"tokens_{place}": np.array(engine.greedy(prompt, new)) for place, prompt in enumerate(prompts)}
    engine.clear()
    np.savez(answer_path, logits=engine.read(text, every=True), **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
