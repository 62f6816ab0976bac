"""One model in vLLM: reads requests from stdin, a line of JSON each, and answers them on stdout.

    VLLM_PYTHON vllm_worker.py FOLDER SETTINGS

Run by :mod:`fxfuse.bench.engines.process`, whose ``Settings`` it is given as JSON, by the Python that has vLLM, which
need not have fxfuse. The first line it says is what it has loaded, or why it has not. A request has ``prompts`` (lists
of tokens) and ``tokens``, how many to generate for each; the answer has those tokens, chosen greedily, and for how many
CPU seconds this process was ``busy``. Prefixes are not cached, so that a prompt that is asked twice is read twice.
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
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        how = vllm.SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
        began = time.process_time()
        made = model.generate(prompts, how, use_tqdm=False)
        busy = time.process_time() - began
        say({"tokens": [list(each.outputs[0].token_ids) for each in made], "busy": busy})
    return None


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
