"""GPUs by their figures, tiles of kernels, and the times that arithmetic predicts.

Imports `fxfuse.errors` alone.
"""
