"""One model in vLLM: reads requests from stdin, a line of JSON each, and answers them on stdout.

    VLLM_PYTHON vllm_worker.py FOLDER SETTINGS

Run by :mod:`fxfuse.bench.engines.process`, whose ``Settings`` it is given as JSON, by the Python that has vLLM, which
need not have fxfuse. The first line it says is what it has loaded, or why it has not. A request has ``begin``, a list
of prompts (lists of tokens), which are read until each has a first token, or ``go_on``, how many tokens more to make of
each. The answer has all tokens that were made since ``begin``, chosen greedily, how many ``seconds`` it took, and for
how many CPU seconds this process was ``busy``. Prefixes are not cached: a prompt that is asked twice is read twice.
"""

import json
import os
import sys
import time
import traceback
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints, too
    folder, settings = sys.argv[1], json.loads(sys.argv[2])

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        import vllm
    except ImportError as error:
        return say({"missing": str(error), "python": sys.executable})
    try:
        model = load(vllm, folder, settings)
    except Exception as error:  # whatever it is: vLLM has many of its own
        traceback.print_exc()
        return say({"refused": f"{type(error).__name__}: {str(error)[:600]}"})
    say(about(vllm, model))
    sequences = Sequences(vllm, model.llm_engine, settings["room"])
    for line in sys.stdin:
        asked = json.loads(line)
        began, busy = time.perf_counter(), time.process_time()
        made = sequences.begin(asked["begin"]) if "begin" in asked else sequences.go_on(asked["go_on"])
        say({"tokens": made, "seconds": time.perf_counter() - began, "busy": time.process_time() - busy})
    return None


class Sequences:
    """Those that the engine computes at a time: all make a token in each step, once all prompts are read.

    A prompt that is read in an earlier step than others goes on meanwhile, so it has more tokens than they do then.
    """

    def __init__(self, vllm: Any, engine: Any, room: int) -> None:
        self._vllm, self._engine, self._room = vllm, engine, room
        self._made: dict[str, list[int]] = {}
        self._begun = 0

    def begin(self, prompts: list[list[int]]) -> list[list[int]]:
        """Forget the sequences that are there, and read prompts until each has a token."""
        self._engine.abort_request(list(self._made))
        self._made = {f"{self._begun} {row}": [] for row in range(len(prompts))}
        self._begun += 1
        for name, prompt in zip(self._made, prompts, strict=True):
            how = self._vllm.SamplingParams(
                temperature=0, max_tokens=self._room - len(prompt), ignore_eos=True, detokenize=False
            )
            self._engine.add_request(name, {"prompt_token_ids": prompt}, how)
        return self._until(1)

    def go_on(self, count: int) -> list[list[int]]:
        """Make so many tokens more of each."""
        return self._until(min(map(len, self._made.values())) + count)

    def _until(self, count: int) -> list[list[int]]:
        while min(map(len, self._made.values())) < count:
            if not self._engine.has_unfinished_requests():
                raise SystemExit(f"there is no room for {count} tokens after each prompt")
            for each in self._engine.step():
                self._made[each.request_id] = list(each.outputs[0].token_ids)
        return list(self._made.values())


def load(vllm: Any, folder: str, settings: dict[str, Any]) -> Any:
    """The engine with the model in ``folder``; under a plan by the plugin of fxfuse, which is installed there then."""
    planned: dict[str, Any] = {}
    if settings["plan"] is not None:
        planned = {
            "config_format": "fxfuse",
            "load_format": "fxfuse",
            "hf_overrides": {"fxfuse_plan": settings["plan"]},
        }
    return vllm.LLM(
        folder,
        dtype=settings["dtype"],
        max_model_len=settings["room"],
        max_num_seqs=settings["sequences"],
        enforce_eager=not settings["compiled"],
        trust_remote_code=True,
        model_impl=settings["implementation"],
        enable_prefix_caching=False,
        seed=0,
        gpu_memory_utilization=settings["memory"],
        skip_tokenizer_init=True,  # requests are tokens
        **planned,
    )


def about(vllm: Any, model: Any) -> dict[str, Any]:
    """What it has loaded; see ``Served``."""
    config = model.llm_engine.vllm_config
    kind = config.model_config.architecture
    cache = config.cache_config
    return {
        "description": f"vLLM {vllm.__version__}, {kind}, {str(config.model_config.dtype).removeprefix('torch.')}",
        "vocabulary": config.model_config.get_vocab_size(),
        "holds": cache.num_gpu_blocks * cache.block_size,
    }


if __name__ == "__main__":
    main()
