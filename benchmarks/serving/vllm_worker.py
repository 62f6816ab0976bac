"""One model in vLLM: reads requests from stdin, a line of JSON each, and answers them on stdout.

    VLLM_PYTHON benchmarks/serving/vllm_worker.py FOLDER IMPLEMENTATION [compiled]

Run by :mod:`benchmarks.serving.engine`, with the environment that vLLM needs, and by the Python that has vLLM, which
need not have fxfuse. A request has ``prompts`` (lists of tokens) and ``tokens``, how many to generate for each; the
answer has those tokens, chosen greedily, and for how many CPU seconds this process was ``busy``. Prefixes are not
cached, so that a prompt that is asked twice is read twice.
"""

import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints, too
    folder, implementation, *rest = sys.argv[1:]
    from vllm import LLM, SamplingParams

    model = LLM(
        folder,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=32,
        enforce_eager="compiled" not in rest,
        trust_remote_code=True,
        model_impl=implementation,
        enable_prefix_caching=False,
        seed=0,
        gpu_memory_utilization=0.2,  # on CPUs, of the memory: several engines are there at once
    )
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        how = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
        began = time.process_time()
        made = model.generate(prompts, how, use_tqdm=False)
        busy = time.process_time() - began
        told = {"tokens": [list(each.outputs[0].token_ids) for each in made], "busy": busy}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main()
