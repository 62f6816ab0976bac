"""Kernels where a GPU runs them; without one, the same tests under Triton's interpreter, at small sizes.

By hand without a GPU: ``TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python -m pytest tests/gpu``. ``make gpu`` runs them
as its second part, and its rehearsal interprets them.
"""

from __future__ import annotations

import torch

from tests.kernels.interpreting import INTERPRETED, poison

__all__ = ["poison"]  # a fixture

# Triton decides when a kernel is defined whether it will be interpreted, so one process cannot do both.
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]
