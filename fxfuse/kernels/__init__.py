"""Kernels: a wide FFN in two GPU kernels, as ops that ``torch.compile`` and ``torch.export`` take as they are.

Importing this package registers ``torch.ops.fxfuse.wide_ffn`` and its halves ``gate_up_act`` and ``down_add``
(`fxfuse.kernels.ops`). The rest of fxfuse reaches them by these names only, and asks `cost` whether they pay; this
package imports nothing of it but the errors. Triton is needed where a GPU computes, and not before.

    pack.py        the weights of n FFNs as one packed pair, gains folded in
    ops.py         the ops: schema, checks, shapes, gradients by recomputation
    aten.py        what they compute, in ATen: CPUs, and every gradient
    launch.py      what they launch on a GPU
    gate_up.py     kernel 1: norm, gate and up, activation
    down.py        kernel 2: down, bias and residual, split over depth
    rstd.py        the statistics of the norm, where kernel 1 does not take them along
    configs.py     the table of tiles;  pick.py picks from it by arithmetic, tune.py by measuring
    reference.py   naive mathematics to judge all of this by
    compile.py     registers, spills and instructions without a GPU
    times.py       modelled time of a GEMM, from public figures of gpus.py;  cost.py: of FFNs, fused and not
"""

from fxfuse.kernels import ops as ops
