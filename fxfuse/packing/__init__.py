"""Packed weights: joined and folded from the weights of a model, and never stale.

    expressions.py   a packed weight as an expression in the graph
    recipe.py        the same, taken out of the graph: how to compute the packed tensor of its members
    strategy.py      how packed values are kept: copied, shared, opaque
    packs.py         the packed tensors of a model, and what they were made of
    calls.py         a compiled graph that gets its packed weights at each call
    fingerprint.py   whether tensors still hold what they held

Imports `fxfuse.graph` and `fxfuse.ffn`.
"""
