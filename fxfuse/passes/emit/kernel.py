"""When a wide FFN is a call of fxfuse's kernels, ``torch.ops.fxfuse.wide_ffn``, and how that call is written.

On GPUs the ops are two Triton kernels, elsewhere they are ATen (:mod:`fxfuse.kernels`). What the compiler of the graph
sees is one opaque op, so on a CPU, whose compiler can do more with ATen, they are written only if asked for. An FFN
that is fused with no other becomes such a call where its gate and up are to be merged anyhow, and where a model of the
GPU (:mod:`fxfuse.hardware.cost`) says that it pays: with few tokens, by the launches that it saves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, TypeAlias

import torch
from torch import fx

import fxfuse.kernels  # noqa: F401  # registers the ops
from fxfuse.ffn.activation import Activation, activation_of
from fxfuse.ffn.anatomy import FFN, Projection
from fxfuse.ffn.rms import rms
from fxfuse.graph.values import dtype, value
from fxfuse.hardware import cost, gpus
from fxfuse.stream.branch import Branch

Kernels: TypeAlias = Literal["auto", "fxfuse", "aten"]
"""Whose kernels compute wide FFNs: fxfuse's on GPUs that can run them and ATen's elsewhere, or always the same."""

ALIGNMENT = 16
"""Hidden units are padded to a multiple of this: other sizes cost the kernels their wide loads."""

_ON_GPUS = (torch.float32, torch.float16, torch.bfloat16)
WIDE_FFN = torch.ops.fxfuse.wide_ffn.default


@dataclass(frozen=True)
class Kernel:
    """What the op needs to know besides the weights.

    Attributes:
        activation: by name.
        norm: the tokens before their RMS norm, and its eps, where the kernel can take the norm along.
    """

    activation: Activation
    norm: tuple[fx.Node, float] | None


def kernel_of(branches: Sequence[Branch], kernels: Kernels) -> Kernel | str:
    """The call that computes ``branches``, FFNs of one form; or in words, why ATen computes them."""
    if kernels == "aten":
        return "kernels='aten'"
    ffns = [branch.ffn for branch in branches if branch.ffn is not None]
    first = ffns[0]
    weight = value(first.down.weight)
    if weight is None:
        return "the graph does not tell dtype and device of its weights"
    if kernels == "auto" and not _runs_on(weight):
        return f"fxfuse has no kernels for {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    if kernels == "auto" and weight.dtype == torch.float32 and _tf32():
        return "float32 may be multiplied as TF32 here, and fxfuse's kernels multiply it as it is"
    activations = [activation_of(ffn) for ffn in ffns]
    if activations[0] is None:
        return "fxfuse's kernels do not have its activation"
    nodes = [node for each in (*first.projections, first.down) for node in (each.weight, each.bias, each.output)]
    dtypes = {dtype(node) for node in nodes if node is not None}
    if dtypes != {weight.dtype}:
        return "it computes in several dtypes, as under autocast"
    norm = rms(first.normed)
    if norm is not None and dtype(norm[0]) != weight.dtype:
        norm = None  # what its statistics are taken of is not what the projections read
    return Kernel(activations[0], norm)


def kernel_alone(branch: Branch, kernels: Kernels) -> Kernel | str:
    """The call that computes an FFN which is fused with no other; or in words, why its GEMMs stay as they are."""
    found = kernel_of([branch], kernels)
    if isinstance(found, str):
        return found
    if found.activation.up is None:
        return "it has no gate to merge with its up"
    assert branch.ffn is not None
    if kernels == "auto" and not _pays(branch.ffn):
        return "fxfuse's kernels are modelled to be slower here"
    return found


def gate_first(ffn: FFN) -> tuple[Projection, ...]:
    """The projections in the order in which the kernels take them."""
    found = activation_of(ffn)
    assert found is not None
    return (found.gate,) if found.up is None else (found.gate, found.up)


def call_kernel(
    graph: fx.Graph,
    kernel: Kernel,
    source: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    down: fx.Node,
    down_bias: fx.Node | None,
    eps: float | None,
) -> fx.Node:
    """The op's call, written at the insertion point; ``weight`` is ``[2 F, d]``, or ``[F, d]`` for a plain MLP."""
    count = 1 if kernel.activation.up is None else 2
    gate_up = graph.call_method("unflatten", (weight, 0, (count, -1)))
    gate_up_bias = None if bias is None else graph.call_method("unflatten", (bias, 0, (count, -1)))
    arguments = (source, gate_up, down, None, gate_up_bias, down_bias, None, None, eps, kernel.activation.name)
    return graph.call_function(WIDE_FFN, arguments)


def _runs_on(weight: torch.Tensor) -> bool:
    """Whether the Triton kernels run where ``weight`` is."""
    if weight.device.type != "cuda" or weight.dtype not in _ON_GPUS or torch.version.hip is not None:
        return False
    return find_spec("triton") is not None and torch.cuda.get_device_capability(weight.device) >= (8, 0)


def _tf32() -> bool:
    """Whether cuBLAS may round float32 to TF32."""
    return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


def _pays(ffn: FFN) -> bool:
    """Whether the kernels are modelled to be faster for the number of tokens that the graph was traced with."""
    read, weight = value(ffn.projections[0].input), value(ffn.projections[0].weight)
    assert weight is not None
    sizes = [] if read is None else [hint(size) for size in read.shape]
    known = [size for size in sizes if size]
    if len(known) < max(len(sizes), 2):
        return False
    layer = cost.Layer(known[-1], ffn.projections[0].width, math.prod(known[:-1]), dtype=weight.dtype)
    return cost.pays(layer, gpus.figures(gpus.of_device(weight.device)))


def hint(size: int | torch.SymInt) -> int | None:
    """The size that a graph is traced with; asking adds no guard. None for one that depends on data."""
    found = size.node.hint if isinstance(size, torch.SymInt) else size
    return found if isinstance(found, int) else None
