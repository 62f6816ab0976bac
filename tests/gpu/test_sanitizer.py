"""No kernel reads or writes outside its tensors, says NVIDIA's compute-sanitizer where it is installed."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.gpu.here import INTERPRETED

SANITIZER = shutil.which("compute-sanitizer")


@pytest.mark.skipif(SANITIZER is None and torch.cuda.is_available(), reason="compute-sanitizer is not installed")
def test_no_access_is_outside() -> None:
    """Without a GPU the calls are made all the same, by the interpreter."""
    tool = [] if INTERPRETED else [str(SANITIZER), "--error-exitcode", "9", "--launch-timeout", "0"]
    # Each tensor in memory of its own, or what lies outside of one would be inside of another.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*tool, sys.executable, "-m", "tests.gpu.small"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "small calls: right" in done.stdout
