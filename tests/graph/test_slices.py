"""Slices of the last dimension: the same rows as Python's own slices take, and hashable on every Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.graph.slices import Rows


@pytest.mark.parametrize("cut", [slice(None), slice(2, 5), slice(-3, None), slice(None, 40, 2), slice(5, 2)])
def test_rows_are_those_of_the_slice(cut: slice) -> None:
    rows, whole = Rows.of(cut, 8), list(range(8))

    assert whole[rows.cut] == whole[cut]
    assert rows.count == len(whole[cut])


def test_rows_are_keys() -> None:
    assert {Rows(0, 4): "gate", Rows(4, 8): "up"}[Rows(4, 8, 1)] == "up"


def test_chunks_of_a_map_of_no_rows_are_no_projection() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 0, bias=False), nn.Linear(0, 8)

        def forward(self, h: Tensor) -> Tensor:
            gate, up = self.up(h).chunk(2, -1)
            return h + self.down(torch.relu(gate) * up)

    explained = fxfuse.explain(nn.Sequential(Empty(), Empty()), torch.ones(2, 3, 8))

    assert [branch.fused for branch in explained.branches] == ["", ""]
