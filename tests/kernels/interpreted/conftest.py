"""Kernels interpreted on a CPU, in a process of its own: ../test_interpreted.py starts one for each file.

By hand: ``TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python -m pytest tests/kernels/interpreted``.
"""

from __future__ import annotations

from tests.kernels.interpreting import INTERPRETED, poison

__all__ = ["poison"]  # a fixture

# Triton decides when a kernel is defined whether it will be interpreted, so one process cannot do both.
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]
