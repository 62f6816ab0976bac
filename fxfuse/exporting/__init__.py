"""A planned model as files that other programs run: checkpoints for transformers and engines, without fxfuse.

Imports `fxfuse.backend`, for the graph that tells what a model is, and `fxfuse.measure` for the digest of its weights.
"""
