"""The residual stream of a graph: its sums, its branches, their kinds and names.

Imports `fxfuse.graph` and `fxfuse.ffn`.
"""
