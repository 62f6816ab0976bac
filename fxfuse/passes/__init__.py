"""Rewrites of FX graphs, one a file. Each can be called alone, returns a report, and leaves the graph linted.

| pass | what it does | exact |
|---|---|---|
| :func:`simplify` | one dialect, sizes where they lack, no identities in the stream | yes |
| :func:`drop` | takes branches out of the stream | it is a plan's edit |
| :func:`linear` | puts one linear map in an attention's place | it is a plan's edit |
| :func:`narrow` | lets FFNs keep some of their hidden units | it is a plan's edit |
| :func:`parallelize` | lets groups of branches read one point | it is a plan's edit |
| :func:`fuse_ffn` | parallel FFNs become one wide FFN | yes |
| :func:`merge_gate_up` | gate and up of an FFN, or of several that stand in parallel, become one GEMM | yes |
| :func:`join_reductions` | what several processes add up, they add up once for each sum | yes |
| :func:`apply_plan` | all of these, in that order | but for the plan |
"""

from fxfuse.passes.base import Edit, PassReport
from fxfuse.passes.drop import drop
from fxfuse.passes.fuse_ffn import fuse_ffn
from fxfuse.passes.join_reductions import join_reductions
from fxfuse.passes.linear import linear
from fxfuse.passes.merge_gate_up import merge_gate_up
from fxfuse.passes.narrow import narrow
from fxfuse.passes.parallelize import parallelize
from fxfuse.passes.pipeline import REPORTS, apply_plan
from fxfuse.passes.simplify import simplify

__all__ = [
    "REPORTS",
    "Edit",
    "PassReport",
    "apply_plan",
    "drop",
    "fuse_ffn",
    "join_reductions",
    "linear",
    "merge_gate_up",
    "narrow",
    "parallelize",
    "simplify",
]
