"""Kernels interpreted on a CPU, in a process of its own: ../test_interpreted.py starts one for each file.

By hand: ``TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python -m pytest tests/kernels/interpreted``.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton decides when a kernel is defined whether it will be interpreted, so one process cannot do both.
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from tests.kernels.interpreted import faithful

    faithful.install()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written yet holds NaN, or a large integer, and not by luck what is wanted."""
    stock = Tensor.new_empty

    def new_empty(self: Tensor, *size: object, **options: object) -> Tensor:
        empty = stock(self, *size, **options)
        return empty.fill_(float("nan") if empty.is_floating_point() else torch.iinfo(empty.dtype).max // 3)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
