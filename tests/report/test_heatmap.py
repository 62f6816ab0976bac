from __future__ import annotations

from pathlib import Path

import fxfuse
from fxfuse.report import save_heatmap
from tests.models.tiny import Tower, vectors


def test_the_heatmap_is_a_picture_of_the_matrix(tmp_path: Path) -> None:
    from matplotlib import image

    recording = fxfuse.record(Tower(3), [{"x": vectors()}])

    save_heatmap(recording, tmp_path / "heatmap.png")

    picture = image.imread(tmp_path / "heatmap.png")
    assert picture.ndim == 3 and min(picture.shape[:2]) > 300
    assert picture[..., :3].std() > 0.05
