"""Facts of any FX graph: ops in one vocabulary, what they leave of a value, sizes, weights, writes, order, slices.

Knows torch.fx, and neither streams nor compilers. Imports `fxfuse.errors` alone.
"""
