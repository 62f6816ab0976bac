"""Which parts of an FFN whose weights are quantized in blocks can be joined with those of others, exactly.

Rows of projections that read one value stand above each other, each with its own scales: a scale belongs to a row, or
to a group along it. Columns of ``down`` stand beside each other where each group of columns has its own scale; one
scale for a whole row would have to be as many as there are FFNs. What quantizes its inputs takes their scale over all
hidden units, so that joined ones would share it. No gain goes into quantized numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxfuse.ffn.projection import Projection
from fxfuse.graph.blocks import Blocks, blocks_at
from fxfuse.graph.special import unpackable


@dataclass(frozen=True)
class Quantized:
    """How the weights of an FFN are quantized that can be a part of a wide one."""

    projections: Blocks
    down: Blocks


def stacked(projections: Sequence[Projection]) -> Blocks | str:
    """How the weights of ``projections`` are quantized, whose rows can be joined; why not; "" if they are plain."""
    found = {blocks_at(each.weight) for each in projections}
    if len(found) > 1:
        return "some of its projections are quantized, and in other ways than others"
    (blocks,) = found
    if isinstance(blocks, str):
        return blocks
    if any(each.transposed or each.rows is not None for each in projections):
        return f"its quantized weights ({blocks.name}) are read transposed or in parts"
    if blocks.rows != 1:
        return f"its weights are quantized ({blocks.name}) with one scale for several rows"
    if len({each.bias is None for each in projections}) > 1:
        return f"its weights are quantized ({blocks.name}), and only some of its projections have a bias"
    return unpackable(each.bias for each in projections) or blocks


def joinable(
    projections: Sequence[Projection], down: Projection, gains: Sequence[fx.Node], constants: Sequence[fx.Node]
) -> Quantized | str:
    """How an FFN with quantized weights can be a part of a wide one; or in words, why not."""
    rows = stacked(projections)
    if isinstance(rows, str):
        return rows or f"only its down projection is quantized: {unpackable([down.weight])}"
    columns = blocks_at(down.weight)
    if isinstance(columns, str):
        return columns or f"its down projection is not quantized as its others are ({rows.name})"
    if down.transposed or down.rows is not None or columns.rows != 1:
        return f"its down projection is quantized ({columns.name}) with one scale for several rows"
    if columns.dynamic:
        return (
            f"its down projection quantizes its inputs ({columns.name}), with one scale for all hidden units of a "
            "token: a joined one would share it among FFNs, so at most their gate and up are joined"
        )
    if columns.columns >= down.fan_in:
        return (
            f"its down projection is quantized ({columns.name}) with one scale for a whole row, of which a joined one "
            "would need one for each FFN, so at most their gate and up are joined"
        )
    if down.fan_in % columns.columns:
        return f"its hidden units are no multiple of the {columns.columns} that have a scale in its down projection"
    if gains:
        return f"its output has a gain, which cannot go into quantized weights ({columns.name})"
    return unpackable([*constants, down.bias]) or Quantized(rows, columns)
