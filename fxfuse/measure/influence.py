"""Block influence (ShortGPT, arXiv 2403.03853): how far a whole block turns the stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

from fxfuse._torch.compiled import original
from fxfuse._torch.dynamo import raising
from fxfuse.backend.frontend import compiled_apart, take
from fxfuse.data.batches import check_batch, eval_mode, fresh, on_device_of
from fxfuse.errors import PlanError, RecordError, nearest
from fxfuse.graph.rerun import Program
from fxfuse.measure.divergence import cosine_distance, rows
from fxfuse.model.force import uncompiled
from fxfuse.passes.pipeline import edit
from fxfuse.plan import Plan
from fxfuse.stream.finder import find_streams

Block: TypeAlias = tuple[str, ...]
"""The names of a block's branches, in stream order."""


def block_influence(
    model: nn.Module, batches: Iterable[Mapping[str, object]], blocks: Sequence[Block]
) -> dict[Block, float]:
    """For each block ``1 - cos`` of the stream before its first branch and after its last one, the mean over tokens.

    Args:
        model: any module that torch.compile traces to one graph; it stays as it is.
        batches: keyword arguments of its calls. Positions where ``attention_mask`` is 0 do not count.
        blocks: branches by name.

    Raises:
        PlanError: there is no branch of a name.
        RecordError: there is no batch.
    """
    own = original(model)
    totals, tokens = dict.fromkeys(blocks, 0.0), 0
    counted: Tensor | None = None

    def look(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        captured = take(gm, inputs, own)
        edit(captured.gm, Plan(), names=captured.names)
        ends = _ends(captured.gm, captured.names, blocks)
        program = Program(captured.gm)
        keep = {node for pair in ends.values() for node in pair}

        def run(*given: object) -> object:
            nonlocal tokens
            output, values = program.run(given, keep)
            for block, pair in ends.items():
                before, after = (rows(_tensor(values[node]), counted).float() for node in pair)
                totals[block] += float(cosine_distance(before, after).double().sum())
            tokens += len(before) if ends else 0
            return output

        return run

    compiled = compiled_apart(own, look, dynamic=None)
    with eval_mode(own), uncompiled(own):
        for number, batch in enumerate(batches):
            given = on_device_of(own, fresh(check_batch(number, batch)))
            mask = given.get("attention_mask")
            counted = mask if isinstance(mask, Tensor) else None
            with raising(PlanError):
                compiled(**given)
    if not tokens:
        raise RecordError("nothing was measured: give at least one batch, and one block")
    return {block: total / tokens for block, total in totals.items()}


def _ends(
    gm: fx.GraphModule, names: Mapping[fx.Node, str], blocks: Sequence[Block]
) -> dict[Block, tuple[fx.Node, fx.Node]]:
    """The stream before and after each block."""
    sums = {branch.name: each for stream in find_streams(gm, names) for each in stream.sums for branch in each.branches}
    for name in (name for block in blocks for name in block):
        if name not in sums:
            raise PlanError(f"there is no branch {name!r}{nearest(name, sums)}")
    return {block: (sums[block[0]].stream.node, sums[block[-1]].out) for block in blocks}


def _tensor(value: object) -> Tensor:
    assert isinstance(value, torch.Tensor)
    return value
