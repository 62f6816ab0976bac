"""The anatomy of a feed-forward network in a graph: norms, projections, activations, and how they form one FFN.

Imports `fxfuse.graph`.
"""
