"""GPUs by their figures, tiles of kernels, models as numbers, and the times that arithmetic predicts.

Imports `fxfuse.plan` and `fxfuse.errors` alone.
"""
