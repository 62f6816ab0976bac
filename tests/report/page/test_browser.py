"""The page in a browser: no complaint, the same by pointer and by keyboard, readable at any width, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fxfuse import Plan
from fxfuse.report.page import save_report
from tests.report.page.browser import CHROMIUM, Browser, browser
from tests.report.page.pages import RESULTS, layers, plan_of_layers
from tests.report.page.test_page import hostile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]

looks = pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)])


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    save_report(layers(6), path, plan_of_layers(), RESULTS)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "page.html"
    wide = [f"model.layers.{index}.mlp" for index in range(10, 50)]
    long = [[f"model.layers.{i}.{part}" for i in range(at, at + 9) for part in ("attn", "mlp")] for at in (60, 69)]
    save_report(layers(126), path, Plan(parallel=[wide, long]), RESULTS)
    return path


@looks
@pytest.mark.parametrize("which", ["page", "large"])
def test_it_fits_the_screen_without_a_complaint_and_text_can_be_read(
    which: str, width: int, dark: bool, tab: Browser, request: pytest.FixtureRequest
) -> None:
    tab.open(request.getfixturevalue(which), width, dark=dark)

    assert tab.errors == []
    assert tab.run("document.documentElement.scrollWidth") == width
    smallest = tab.run("""Math.min(...[...document.querySelectorAll("svg text")]
        .filter((text) => text.getClientRects().length)
        .map((text) => parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a,
            text.getScreenCTM().b)))""")
    assert smallest >= 8.5


@looks
def test_words_stand_out_from_the_paper(width: int, dark: bool, tab: Browser, page: Path) -> None:
    tab.open(page, width, dark=dark)

    def luminance(colour: list[float]) -> float:
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def colour(selector: str, name: str) -> list[float]:
        told = tab.run(f"getComputedStyle(document.querySelector('{selector}')).{name}")
        return [float(part) / 255 for part in told[4:-1].split(",")]

    paper = luminance(colour("body", "backgroundColor"))
    assert (paper < 0.05) == dark
    for selector, name in [("p", "color"), (".hint", "color"), ("td", "color"), (".grid + g text", "fill"),
                           (".kept", "color"), (".refused", "color"), (".kind-A b", "color"), (".kind-F b", "color"),
                           (".names text", "fill"), (".dropped", "color")]:  # fmt: skip
        light, deep = sorted((paper, luminance(colour(selector, name))), reverse=True)
        assert (light + 0.05) / (deep + 0.05) >= 4.5, selector


def point_at_cell(tab: Browser, row: int, column: int, size: int) -> None:
    """Bring the pointer over a cell; what is painted has no first column and no last row."""
    tab.hover("#cells", (column - 0.5) / (size - 1), (row + 0.5) / (size - 1))


@looks
def test_a_cell_tells_the_same_by_pointer_and_by_keyboard(width: int, dark: bool, tab: Browser, page: Path) -> None:
    recorded = layers(6)
    tab.open(page, width, dark=dark)
    assert tab.tip() is None

    point_at_cell(tab, 2, 5, 12)

    hovered = tab.tip()
    assert hovered is not None
    dropped, measured, numbers = hovered.split("\n")
    assert (dropped, measured) == ("dropped: model.layers.1.attn", "measured: model.layers.2.mlp")
    mean, p99, largest = (float(getattr(recorded, name)[2, 5]) for name in ("mean", "p99", "max"))
    assert numbers == f"cosine distance: mean {mean:.3g}, p99 {p99:.3g}, max {largest:.3g}"
    point_at_cell(tab, 5, 2, 12)
    assert tab.tip() is None

    tab.open(page, width, dark=dark)
    tab.run("document.getElementById('show-mean').focus()")
    tab.press("Tab")
    for key in ["ArrowRight"] * 4 + ["ArrowDown"] * 2:
        tab.press(key)
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp"):
        tab.press(key)
    assert tab.tip() == hovered
    tab.press("Escape")
    assert tab.tip() is None


@looks
@pytest.mark.parametrize("marks", [".stream", ".chart.{shown}"])
def test_a_mark_tells_the_same_by_pointer_and_by_keyboard(
    marks: str, width: int, dark: bool, tab: Browser, page: Path
) -> None:
    place = marks.format(shown="wide" if width > 760 else "narrow")
    tab.open(page, width, dark=dark)

    tab.hover(f"{place} [data-mark]")

    first = tab.tip()
    assert first == tab.run(f"document.querySelector('{place} [data-mark]').getAttribute('aria-label')")
    box = tab.run("(b => [b.left, b.top, b.right, b.bottom])(document.getElementById('tip').getBoundingClientRect())")
    assert 0 <= box[0] <= box[2] <= width and 0 <= box[1] <= box[3] <= 900
    tab.press("Escape")

    reachable = f"document.querySelectorAll('{place}')[0].querySelectorAll(\"[tabindex='0']\").length"
    assert tab.run(reachable) == 1
    tab.run(f"document.querySelector('{place} [data-mark]').focus()")
    assert tab.tip() == first
    tab.press("ArrowRight")
    second = tab.tip()
    assert second not in (None, first)
    tab.press("Home")
    assert tab.tip() == first
    tab.press("ArrowLeft")
    assert tab.tip() == first
    tab.press("End")
    assert tab.tip() not in (None, first, second)
    assert tab.run(reachable) == 1
    assert tab.errors == []


@looks
def test_groups_are_wide_boxes_around_their_members(width: int, dark: bool, tab: Browser, page: Path) -> None:
    tab.open(page, width, dark=dark)

    boxes = tab.run("""[...document.querySelectorAll(".stream .group")].map((group) =>
        [group, ...group.querySelectorAll(".branch")].map((one) => one.getBoundingClientRect())
            .map((box) => [box.left, box.top, box.right, box.bottom]))""")

    assert [len(members) for _, *members in boxes] == [3, 4]
    for (left, top, right, bottom), *members in boxes:
        assert right <= width
        for index, member in enumerate(members):
            assert left < member[0] < member[2] < right and top < member[1] < member[3] < bottom
            assert all(member[2] <= other[0] or member[3] <= other[1] for other in members[index + 1 :])
    single = tab.run("document.querySelector('.stream .branch').getBoundingClientRect().width")
    assert all(group[2] - group[0] > 3 * single for group, *_ in boxes)
    edges = tab.run(
        "[...document.querySelectorAll('.stream .dropped')].map((one) => getComputedStyle(one).borderStyle)"
    )
    assert edges == ["dashed"] * 2


def test_a_switch_shows_another_statistic(tab: Browser, page: Path) -> None:
    tab.open(page, 1280)
    shown = (
        "[...document.querySelectorAll('.cells')].filter((g) => g.getClientRects().length).map((g) => g.classList[1])"
    )
    assert tab.run(shown) == ["mean"]

    tab.run("document.getElementById('show-max').click()")

    assert tab.run(shown) == ["max"]


def test_names_run_nothing(tab: Browser, tmp_path: Path) -> None:
    save_report(hostile()[0], tmp_path / "page.html", *hostile()[1:])

    tab.open(tmp_path / "page.html", 1280)

    assert tab.errors == []
    assert tab.run("window.broken") is None
    point_at_cell(tab, 0, 1, 6)
    assert tab.tip() is not None and "<img src=x onerror" in str(tab.tip())
    assert tab.run("document.images.length") == 0


def test_one_branch_alone_is_a_page(tab: Browser, tmp_path: Path) -> None:
    recorded = layers(1)
    alone = {name: getattr(recorded, name)[:1, :1] for name in ("mean", "p99", "max")}
    alone |= {name: getattr(recorded, name)[:1] for name in ("cosine", "norm_ratio", "kl")}
    save_report(replace(recorded, branches=recorded.branches[:1], **alone), tmp_path / "page.html")

    tab.open(tmp_path / "page.html", 400)

    assert tab.errors == []
