"""Honest timings: contestants take turns, and the baseline runs twice.

Imports `fxfuse.data` and `fxfuse.model`.
"""

from fxfuse.bench.timing import Machine, interleave

__all__ = ["Machine", "interleave"]
