"""Facts of any FX graph: ops in one vocabulary, sizes, weights, writes, order, slices, factors.

Knows torch.fx, and neither streams nor compilers. Imports `fxfuse.errors` alone.
"""
