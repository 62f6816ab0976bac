"""Costs of branches on a GPU that is not here, by a model of it and not measured.

FFNs as :mod:`fxfuse.hardware.cost` has them: one after the other in a vendor's GEMMs, groups in fxfuse's kernels. All
else is its matrices in a vendor's GEMMs, its KV cache read once, three passes over the tokens and, in a prompt, scores
at the rate of a GEMM. What is left of the weights, embedding and head, is read once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fxfuse._common.bounds import check_count
from fxfuse._torch.compiled import original
from fxfuse.backend.frontend import capture
from fxfuse.bench.branches import BranchTime, Phase
from fxfuse.bench.parts import Cutter
from fxfuse.data.batches import eval_mode
from fxfuse.errors import CaptureError, OptionError
from fxfuse.graph.values import value
from fxfuse.hardware.configs import Gemm
from fxfuse.hardware.cost import Layer, fused, sequential
from fxfuse.hardware.gpus import Gpu, find
from fxfuse.hardware.times import USUAL, library_gemm, peak
from fxfuse.planning.costs import Costs
from fxfuse.stream.branch import Branch

TRACED = 8
"""Tokens of the call that the model is traced with."""


def model_costs(
    model: nn.Module,
    device: str,
    *,
    tp: int = 1,
    batch: int = 1,
    context: int = 2048,
    phase: Phase = "decode",
    dtype: torch.dtype = torch.bfloat16,
    max_group: int = 4,
) -> Costs:
    """What the branches of ``model`` would cost on a GPU; times are those of one of ``tp`` GPUs, bytes of all.

    Args:
        model: a language model, called as Hugging Face models are, on a device that has values.
        device: "h100" or another GPU of :data:`fxfuse.hardware.gpus.GPUS`.
        tp: among how many of them heads and hidden units are divided.
        batch: sequences.
        context: tokens of the prompt, or in the KV cache.
        phase: "prefill", or "decode", a call of one more token.
        dtype: of weights and cache there.
        max_group: FFNs in the largest group.

    Raises:
        KernelError: no such GPU, or hidden units that do not divide by ``tp``.
        OptionError: a phase that there is not, or a number out of range.
        CaptureError: the model cannot be traced to one graph.
    """
    if phase not in ("decode", "prefill"):
        raise OptionError(f"phase is decode or prefill, not {phase!r}")
    for name, number in (("tp", tp), ("batch", batch), ("context", context), ("max_group", max_group)):
        check_count(name, number)
    own = original(model)
    place = next((parameter.device for parameter in own.parameters()), torch.device("cpu"))
    ids = torch.zeros(1, TRACED, dtype=torch.int64, device=place)
    with eval_mode(own):
        graphs = capture(own, input_ids=ids, use_cache=True)
    if len(graphs) > 1:
        raise CaptureError(f"the model runs through {len(graphs)} graphs: TORCH_LOGS=graph_breaks shows what cuts it")
    cutter = Cutter(graphs[0])
    there = _There(find(device), tp, batch, context, phase, dtype)
    branches = tuple(there.branch(cutter, branch, max_group) for stream in cutter.streams for branch in stream.branches)
    memory = sum(weight.numel() for weight in (*own.parameters(), *own.buffers())) * dtype.itemsize
    rest = max(0, memory - sum(branch.parameters for branch in branches)) / tp
    whole = sum(branch.seconds for branch in branches) + there.read(rest)
    where = f"{there.gpu.name}, {tp} of them, {str(dtype).removeprefix('torch.')}"
    return Costs(whole, memory, branches, phase, batch, context, where, modelled=True)


class _There:
    """The GPU and the call."""

    def __init__(self, gpu: Gpu, tp: int, batch: int, context: int, phase: Phase, dtype: torch.dtype) -> None:
        self.gpu, self._tp, self._dtype = gpu, tp, dtype
        self._batch, self._context, self._phase = batch, context, phase
        self._tokens = batch * (context if phase == "prefill" else 1)

    def branch(self, cutter: Cutter, branch: Branch, max_group: int) -> BranchTime:
        """What one branch costs."""
        seen = value(branch.read)
        assert seen is not None  # Dynamo records all
        d, item = int(seen.shape[-1]), seen.element_size()
        bytes_ = cutter.parameter_bytes(branch) // item * self._dtype.itemsize
        if branch.ffn is not None and branch.ffn.gated:
            width = branch.ffn.projections[0].width
            layer = Layer(d, width, self._tokens, self._tp, self._dtype)
            alone = sequential(layer, 1, self.gpu).seconds
            groups = (alone, *(fused(layer, size, self.gpu).seconds for size in range(2, max_group + 1)))
            unit = cutter.unit_bytes(branch) // item * self._dtype.itemsize
            return BranchTime(branch.name, alone, None, groups, bytes_, 0, 0, width, unit, self._all_reduce(d))
        per_token = cutter.cache_bytes(branch) / TRACED / item * self._dtype.itemsize
        cache = round(per_token * self._batch * (self._context + (self._phase == "decode")))
        matrices = [held for node in branch.parameters if (held := value(node)) is not None and held.dim() > 1]
        seconds = sum(self._gemm(held) for held in matrices) + self.read(cache / self._tp)
        reduction = self._all_reduce(d)
        seconds += 3 * USUAL.pass_launch + reduction
        if branch.kind != "attention":
            return BranchTime(branch.name, seconds, None, (), bytes_, 0, cache, reduction=reduction)
        widest = max((held.numel() // d for held in matrices), default=0)
        if self._phase == "prefill":  # scores and their product with values, half of them masked
            seconds += (
                2 * self._tokens * self._context * widest / self._tp / (USUAL.flops * peak(self._dtype, self.gpu))
            )
        linear = self._gemm_of(d, d) + USUAL.pass_launch + reduction
        kept = d * d * self._dtype.itemsize
        return BranchTime(branch.name, seconds, linear, (), bytes_, kept, cache, reduction=reduction)

    def read(self, amount: float) -> float:
        """Seconds in which one GPU reads so many bytes."""
        return amount / (self.gpu.bandwidth * USUAL.bandwidth)

    def _gemm(self, weight: Tensor) -> float:
        return self._gemm_of(math.prod(weight.shape[:-1]), int(weight.shape[-1]))

    def _gemm_of(self, rows: int, columns: int) -> float:
        gemm = Gemm("down", self._tokens, max(1, rows // self._tp), columns, self._dtype)
        return library_gemm(gemm, self.gpu).seconds

    def _all_reduce(self, d: int) -> float:
        """Of the tokens once: what an FFN of so many GPUs takes longer than its share on one."""
        if self._tp == 1:
            return 0.0
        shared = sequential(Layer(d, 16 * self._tp, self._tokens, self._tp, self._dtype), 1, self.gpu)
        return shared.seconds - sequential(Layer(d, 16, self._tokens, 1, self._dtype), 1, self.gpu).seconds
