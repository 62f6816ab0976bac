"""Every causal language model of transformers, and nets of other people's making, against plain references.

``make zoo`` runs them all and writes docs/architectures.md. No file here but check.py imports fxfuse.
"""
