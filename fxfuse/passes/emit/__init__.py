"""Fused FFNs as nodes of a graph: in ATen (`wide`), or as calls of the kernels of fxfuse (`kernel`)."""
