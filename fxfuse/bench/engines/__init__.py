"""Models in the engines that serve them, timed by turns.

    process.py           an engine with a model, in a process of its own, run by the Python that has that engine
    contest.py           the time to the first token and to each after it, of several of them
    vllm_worker.py       what such a process runs; it need not have fxfuse
    llama_cpp_worker.py  the same for llama.cpp

Imports `fxfuse.bench.timing` and `fxfuse.errors`.
"""
