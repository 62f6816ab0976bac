"""Kernels: a wide FFN in two GPU kernels, as ops that ``torch.compile`` and ``torch.export`` take as they are.

Importing this package registers ``torch.ops.fxfuse.wide_ffn`` and its halves ``gate_up_act`` and ``down_add``
(`fxfuse.kernels.ops`). The rest of fxfuse reaches them by these names only, and asks `fxfuse.hardware.cost`
whether they pay. Imports `fxfuse.hardware` and the errors; Triton where a GPU computes, and not before.

    ops.py         the ops: schema, checks, shapes, gradients by recomputation
    aten.py        what they compute, in ATen: CPUs, and every gradient
    launch.py      what they launch on a GPU
    gate_up.py     kernel 1: norm, gate and up, activation
    down.py        kernel 2: down, bias and residual, split over depth
    rstd.py        the statistics of the norm, where kernel 1 does not take them along
    tune.py        picks tiles by measuring, where `fxfuse.hardware.pick` does by arithmetic
    clock.py       seconds on a GPU
    compile.py     registers, spills and instructions without a GPU
"""

from fxfuse.kernels import ops as ops
