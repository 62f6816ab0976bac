from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fxfuse.report.page import render
from fxfuse.report.page.colours import LEVELS, level, palette
from tests.report.page.pages import Node, distances, layers, plan_of_layers, read, section


def colours(page: Node, statistic: str) -> dict[tuple[int, int], int]:
    """The level of each cell that is painted, by (row, column)."""
    (cells,) = page.all("g", statistic)
    painted: dict[tuple[int, int], int] = {}
    for path in cells.all("path"):
        for column, row, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path.attributes["d"]):
            for at in range(int(column), int(column) + int(length)):
                assert painted.setdefault((int(row), at), int(path.classes[0][1:])) == int(path.classes[0][1:])
    return painted


@pytest.mark.parametrize("statistic", ["mean", "p99", "max"])
def test_each_cell_above_the_diagonal_has_the_colour_of_its_distance(statistic: str) -> None:
    recorded = layers(5)
    values = getattr(recorded, statistic)

    painted = colours(read(render(recorded)), statistic)

    assert painted == {(i, j): level(float(values[i, j])) for i in range(10) for j in range(i + 1, 10)}
    assert len(set(painted.values())) > 5


def test_the_data_holds_what_is_above_the_diagonal_row_by_row() -> None:
    recorded = layers(3)
    broken = recorded.max.clone()
    broken[0, 2], broken[1, 2] = torch.nan, torch.inf

    page = read(render(replace(recorded, max=broken)))

    told = distances(page)
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    assert told["names"] == [branch.name for branch in recorded.branches]
    assert told["mean"] == pytest.approx([float(recorded.mean[pair]) for pair in pairs], rel=5e-3)
    assert [pairs[i] for i, value in enumerate(told["max"]) if value is None] == [(0, 2), (1, 2)]
    assert (0, 2) not in colours(page, "max")


def test_levels_are_equal_factors_from_2_to_the_minus_9_to_one_half() -> None:
    assert [level(value) for value in (0.0, 2**-9, 2**-8.7, 2**-8.6, 2**-5, 0.49, 0.5, 2.0)] == [
        0, 0, 0, 1, 12, LEVELS - 1, LEVELS - 1, LEVELS - 1
    ]  # fmt: skip


def test_lightness_grows_evenly_so_the_scale_reads_without_hues() -> None:
    def lightness(shade: str) -> float:
        """CIE L*, 0..100, of an sRGB colour."""
        linear = [int(shade[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in linear)
        y = 0.2126 * r + 0.7152 * g + 0.0722 * b
        return 116 * y ** (1 / 3) - 16 if y > 216 / 24389 else y * 24389 / 27

    steps = torch.tensor([lightness(shade) for shade in palette(dark=True)]).diff()
    assert steps.min() > 2.0 and steps.max() < 8.0
    assert palette(dark=False) == palette(dark=True)[::-1]


def test_groups_of_the_plan_are_framed() -> None:
    matrix = section(read(render(layers(6), plan_of_layers())), "Which branches depend on which")

    assert [frame.attributes["d"] for frame in matrix.all(class_="frame")] == ["M3 3h5v5z", "M8 8h4v4z"]
    assert [name.text for name in matrix.all("g", "names")[0].all(class_="gone")] == ["2.attn", "3.attn"]
