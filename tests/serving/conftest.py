"""Exports in the engines that serve them: ``make serve-test`` makes their environments, and names them to the tests."""

from __future__ import annotations

import os

# The Python that has vLLM: engines want other versions of transformers than fxfuse is tested with.
PYTHON = os.environ.get("SERVING_PYTHON", "")

collect_ignore_glob = [] if PYTHON else ["test_vllm.py"]
