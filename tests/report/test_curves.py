"""Pictures of modelled latency."""

import sys
from pathlib import Path

import pytest

from fxfuse.errors import MissingDependencyError
from fxfuse.report.curves import Curves, save_curves

PANEL = Curves("sequences in a batch", (1, 2, 4), {"one": [1.0, 1.5, 2.0], "other": [0.5, 0.6, 0.7]})


def test_it_is_a_png_that_depends_on_the_numbers(tmp_path: Path) -> None:
    other = Curves(PANEL.over, PANEL.sizes, {**PANEL.ms, "other": [3.0, 2.0, 1.0]})
    for name, panels in (("a", [PANEL]), ("b", [other]), ("c", [PANEL, PANEL])):
        save_curves(panels, "modelled", tmp_path / name)
    pictures = [(tmp_path / name).read_bytes() for name in "abc"]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(set(pictures)) == 3


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"fxfuse\[demo\]"):
        save_curves([PANEL], "modelled", tmp_path / "a")
