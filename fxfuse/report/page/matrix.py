"""The dependency matrix, as in figure 3 of FFN Fusion (arXiv 2503.18908): how far each branch turns without another.

Rows are dropped branches, columns measured ones. Only columns right of the diagonal carry anything, so the names stand
on the diagonal, which is where the row of a branch begins and its column ends, and the scale stands below it.
"""

from __future__ import annotations

import math
from itertools import groupby
from xml.etree.ElementTree import Element

from fxfuse.plan import flat
from fxfuse.report.page.colours import HIGHEST, LEVELS, LOWEST, level
from fxfuse.report.page.markup import e
from fxfuse.report.page.subject import Subject

STATISTICS = {"mean": "mean over tokens", "p99": "99th percentile", "max": "worst token"}

SIZE, MARGIN, TOP = 680.0, 104.0, 30.0
"""Of the picture: the side of the matrix, the room to its left for the first names, and that above it for a title."""


def section(subject: Subject) -> Element:
    """The matrix with its scale; a switch chooses the statistic over tokens."""
    switches = []
    for name, words in STATISTICS.items():
        button = e("input", type="radio", name="statistic", id=f"show-{name}", checked=name == "mean")
        switches.append(e("label", button, words))
    tokens = f"{subject.recording.tokens:,}"
    return e(
        "section",
        e("h2", "Which branches depend on which"),
        e(
            "p",
            "Row: the branch that was dropped. Column: how far the contribution of a later branch turns then, as a "
            f"cosine distance (0 to 2) over {tokens} tokens. The lower end of the scale means: hardly at all"
            f"{', and framed triangles are groups of the plan' if subject.plan and subject.plan.parallel else ''}.",
        ),
        e("div", *switches, e("div", _picture(subject), class_="plot"), class_="matrix"),
        e("p", "Point at a cell, or focus the matrix and use the arrow keys.", class_="hint"),
    )


def data(subject: Subject) -> dict[str, object]:
    """All that the script needs to say what is under the pointer.

    For each statistic the part above the diagonal, row by row, to three digits; null where nothing was measured.
    """
    names = [branch.name for branch in subject.recording.branches]
    rows = {name: _above(subject, name) for name in STATISTICS}
    return {"names": names} | {name: [_rounded(v) for row in each for v in row] for name, each in rows.items()}


def _above(subject: Subject, statistic: str) -> list[list[float]]:
    """Row i: the distances of branches i + 1, i + 2, ..."""
    rows: list[list[float]] = getattr(subject.recording, statistic).tolist()
    return [row[i + 1 :] for i, row in enumerate(rows)]


def _rounded(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _picture(subject: Subject) -> Element:
    m = len(subject.recording.branches)
    place = f"translate({MARGIN:g} {TOP:g}) scale({SIZE / max(m, 1):.6g})"
    cells = e("g", *(_cells(subject, name) for name in STATISTICS), transform=place, id="cells")
    marks = e("g", *_frames(subject), e("path", id="cursor", class_="cursor", d=""), transform=place)
    return e(
        "svg",
        cells,
        marks,
        _names(subject),
        _numbers(subject),
        e("text", "measured branch (column) →", x=MARGIN + SIZE, y=TOP - 10, text_anchor="end", class_="title"),
        e("text", "dropped branch (row) →", class_="title", text_anchor="end",
          transform=f"translate({MARGIN + SIZE + 9:g} {TOP + SIZE:g}) rotate(90)"),
        _scale(),
        viewBox=f"0 0 {MARGIN + SIZE + 32:g} {TOP + SIZE + 8:g}",
        id="matrix",
        tabindex="0",
        role="application",
        aria_label=f"Dependency matrix of {m} branches. Arrow keys move from cell to cell.",
    )  # fmt: skip


def _cells(subject: Subject, statistic: str) -> Element:
    """One path for each colour: neighbours in a row that share it are one rectangle."""
    strokes: dict[int, list[str]] = {}
    for i, row in enumerate(_above(subject, statistic)):
        column = i + 1
        for shade, run in groupby(row, lambda value: level(value) if math.isfinite(value) else -1):
            length = len(list(run))
            if shade >= 0:
                strokes.setdefault(shade, []).append(f"M{column} {i}h{length}v1h-{length}z")
            column += length
    paths = (e("path", d="".join(strokes[shade]), class_=f"q{shade}") for shade in sorted(strokes))
    return e("g", *paths, class_=f"cells {statistic}")


def _frames(subject: Subject) -> list[Element]:
    """A frame around what the members of each group of the plan do to each other."""
    frames = []
    for group in subject.plan.parallel if subject.plan is not None else ():
        places = [subject.recording.index(name) for name in flat(group) if _is_there(subject, name)]
        if places:
            first, side = min(places), max(places) + 1 - min(places)
            frames.append(e("path", d=f"M{first} {first}h{side}v{side}z", class_="frame"))
    return frames


def _is_there(subject: Subject, name: str) -> bool:
    return any(branch.name == name for branch in subject.recording.branches)


def _names(subject: Subject) -> Element:
    """Names on the diagonal, as many as there is room for; those of dropped branches are struck out."""
    m = len(subject.labels)
    step = SIZE / max(m, 1)
    every = max(1, math.ceil(9.5 / step))
    size = min(11.0, max(8.5, step - 1))
    texts = []
    for index in range(0, m, every):
        label, name = subject.labels[index], subject.recording.branches[index].name
        x, y = MARGIN + index * step - 4, TOP + (index + 0.5) * step
        texts.append(e("text", label, x=x, y=y, dy="0.35em", class_="gone" if subject.dropped(name) else None))
    return e("g", *texts, class_="names wide", font_size=size, text_anchor="end")


def _numbers(subject: Subject) -> Element:
    """For narrow screens: numbers in place of names."""
    m = len(subject.numbers)
    step = SIZE / max(m, 1)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, max(m, 1)) if n * step >= 30 or n >= m)
    texts = (
        e("text", subject.numbers[index], x=MARGIN + index * step - 5, y=TOP + (index + 0.5) * step, dy="0.35em")
        for index in range(0, m, every)
    )
    return e("g", *texts, class_="names narrow", font_size=22, text_anchor="end", aria_hidden="true")


def _scale() -> Element:
    left, top, width, height = 24.0, TOP + SIZE - 70, 300.0, 16.0
    step = width / LEVELS
    bars = (e("rect", x=left + i * step, y=top, width=step + 0.4, height=height, class_=f"q{i}") for i in range(LEVELS))
    ticks = []
    for power in range(-9, 0, 2):
        share = (power + 9) / (math.log2(HIGHEST / LOWEST))
        words = f"{2.0**power:.1g}"
        words = f"≤{words}" if power == -9 else f"≥{words}" if power == -1 else words
        ticks.append(e("text", words, x=left + share * width, y=top + height + 22, text_anchor="middle",
                       class_=None if power in (-9, -5, -1) else "fine"))  # fmt: skip
    title = e("text", "cosine distance, log scale", x=left, y=top - 10, class_="title")
    return e("g", title, *bars, *ticks, class_="scale")
