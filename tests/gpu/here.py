"""Where the tests of this folder run: the GPU here, or Triton's interpreter in the place of an H100."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from _pytest.mark import ParameterSet
from torch import Tensor

import fxfuse.kernels  # noqa: F401  # registers the ops
from fxfuse.hardware import gpus
from fxfuse.hardware.configs import Kernel
from fxfuse.kernels.calls import Down, GateUp
from fxfuse.kernels.launch import Work, down_work, wide_work
from tests.kernels.cases import Case, rows
from tests.kernels.interpreted import faithful

INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    faithful.take_new_numpy()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# Few multiprocessors, so that small problems fill them.
GPU = replace(gpus.find("h100"), multiprocessors=4) if INTERPRETED else gpus.of_device(torch.device("cuda", 0))


def here(kernel: Kernel) -> list[ParameterSet]:
    """Those of the table's rows, with each dtype, that this GPU runs; all of them where they are interpreted."""
    return [row for row in rows(kernel) if INTERPRETED or GPU.arch in row.values[0].arch]


def wide_ffn(case: Case) -> Tensor:
    """The op on a GPU; where kernels are interpreted, what the op launches, as on CPUs it is ATen's."""
    if not INTERPRETED:
        return torch.ops.fxfuse.wide_ffn(*case.arguments)
    first = GateUp(case.x, case.gate_up, case.gate_up_bias, case.gain, case.rstd, case.eps, case.activation)
    return finish(wide_work(first, case.down, case.residual, case.down_bias, GPU)).view_as(case.x)


def down_add(call: Down) -> Tensor:
    """Likewise for the second half."""
    if not INTERPRETED:
        return torch.ops.fxfuse.down_add(call.hidden, call.weight, call.residual, call.bias)
    return finish(down_work(call, GPU))


def finish(work: Work) -> Tensor:
    """The result of all launches of ``work``."""
    for launch in work.launches:
        launch.run()
    return work.out
