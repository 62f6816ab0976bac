"""How linear maps are computed on CPUs, without gradients: what inductor is told beyond its own rules.

The backend gives inductor one pass over the graph that it makes of ours (aten ops, all sizes known). Products of few
rows become loops (`gemv`), others go to another GEMM (`gemm`), each where it is faster on this machine (`race`). Both
are exact, keep no copy of any weight, and so are always true to it. Who can spend a copy of the weights gets more from
oneDNN: `prepack` goes over the graph before that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import fx

from fxfuse._torch.inductor import CustomGraphPass, get_hash_for_files, is_set
from fxfuse.cpu.gemm import other_gemms
from fxfuse.cpu.gemv import few_rows_as_loops, measure

PASS = "post_grad_custom_pre_pass"
"""The option of inductor that takes the pass."""


class LinearMaps(CustomGraphPass):
    """The pass as inductor takes it."""

    def __call__(self, graph: fx.Graph) -> None:
        few_rows_as_loops(graph)
        other_gemms(graph)

    def uuid(self) -> object:
        """What inductor's caches tell its results by."""
        return get_hash_for_files(tuple(map(str, sorted(Path(__file__).parent.glob("*.py")))))


def with_linear_maps(gm: fx.GraphModule, options: Mapping[str, object]) -> dict[str, object]:
    """Inductor's ``options`` for a graph of Dynamo that computes no gradients, with the pass among them.

    A pass of the user's own in the same place keeps it.
    """
    if PASS in options or is_set(PASS):
        return dict(options)
    measure(gm)
    return {**options, PASS: LinearMaps()}
