"""The backend ``ffnfuse`` of ``torch.compile``, its options, and the way from a traced model to a graph with names.

Imports `fxfuse.passes`, `fxfuse.packing`, `fxfuse.cpu` and `fxfuse.model`.
"""
