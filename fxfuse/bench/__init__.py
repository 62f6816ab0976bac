"""Honest timings: contestants take turns, and the baseline runs twice.

    timing.py          contestants that take turns
    prefill_decode.py  whole models, as they are served
    parts.py           branches cut out of a model's graph
    branches.py        the time of each of them

Imports `fxfuse.data`, `fxfuse.backend`, `fxfuse.passes` and `fxfuse.stream`.
"""

from fxfuse.bench.timing import Machine, interleave

__all__ = ["Machine", "interleave"]
