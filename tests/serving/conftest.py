"""Exports in the engines that serve them: ``make serve-test`` makes their environments, and names them to the tests."""

from __future__ import annotations

import os

# The Python that has vLLM: engines want other versions of transformers than fxfuse is tested with.
PYTHON = os.environ.get("SERVING_PYTHON", "")

# The Python that has llama-cpp-py-sync.
LLAMA_PYTHON = os.environ.get("LLAMA_PYTHON", "")

collect_ignore_glob = ["test_vllm.py"] * (not PYTHON) + ["test_llama_cpp.py"] * (not LLAMA_PYTHON)
