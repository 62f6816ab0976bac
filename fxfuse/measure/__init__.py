"""Measurements of a model: what depends on what (`recorder`), and how good it is (`evaluation`).

Imports `fxfuse.backend` and what that imports, and `fxfuse.data`.
"""
