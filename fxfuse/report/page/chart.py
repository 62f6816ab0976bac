"""What the charts have in common: a frame with labelled axes, and marks that hover and the keyboard can reach.

A chart is drawn twice, for wide and for narrow screens, because text that shrinks with its picture cannot be read;
the style sheet shows the one that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from fxfuse.report.page.axis import Axis
from fxfuse.report.page.markup import e

SHAPES = ("circle", "square", "triangle", "diamond", "down", "cross")
"""Shapes of marks: told apart without colours."""

COLOURS = 7
"""Colours of series in the style sheet, ``.s0`` .. ``.s6`` (M. Okabe and K. Ito's, for the colour-blind)."""


@dataclass(frozen=True)
class Canvas:
    """The size of a picture, in its own units, which are pixels where it is not shrunk.

    Attributes:
        name: "wide" or "narrow"; the class that the style sheet shows or hides.
        width, height: of all of it.
        left, right, top, bottom: room around the plotted part, for labels.
        ticks: about how many labels an axis has.
    """

    name: str
    width: float
    height: float
    left: float = 58.0
    right: float = 14.0
    top: float = 26.0
    bottom: float = 40.0
    ticks: int = 5

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, right, top and bottom edge of the plotted part."""
        return self.left, self.width - self.right, self.top, self.height - self.bottom


def canvases(wide: float, narrow: float) -> tuple[Canvas, Canvas]:
    """The two sizes of a chart, of these heights."""
    return Canvas("wide", 1040, wide, ticks=8), Canvas("narrow", 360, narrow)


def draw(
    canvas: Canvas,
    x: Axis,
    y: Axis,
    words: tuple[str, str],
    name: str,
    *content: Element,
    label: Callable[[float], str] = "{:g}".format,
) -> Element:
    """A chart: its frame, its axes with labels, then ``content``.

    Args:
        canvas: the size.
        x: the horizontal axis, placed in it.
        y: the vertical one.
        words: what x and y are, with units.
        name: of the chart, for those who do not see it.
        content: lines and marks.
        label: what a place on the x axis is called.
    """
    left, right, top, bottom = canvas.box
    grid = [e("line", x1=x(v), x2=x(v), y1=top, y2=bottom) for v in x.ticks(canvas.ticks)]
    grid += [e("line", x1=left, x2=right, y1=y(v), y2=y(v)) for v in y.ticks(5)]
    labels = [e("text", label(v), x=x(v), y=bottom + 16, text_anchor="middle") for v in x.ticks(canvas.ticks)]
    labels += [e("text", f"{v:g}", x=left - 6, y=y(v), dy="0.35em", text_anchor="end") for v in y.ticks(5)]
    titles = [
        e("text", words[0], x=right, y=canvas.height - 6, text_anchor="end", class_="title"),
        e("text", words[1], x=4, y=top - 12, class_="title"),
    ]
    return e(
        "svg",
        e("g", *grid, class_="grid"),
        e("g", *labels, *titles, aria_hidden="true"),
        *content,
        viewBox=f"0 0 {canvas.width:g} {canvas.height:g}",
        class_=f"chart {canvas.name}",
        data_marks=True,
        role="group",
        aria_label=f"{name}; arrow keys move from mark to mark",
    )


def mark(told: str, *parts: Element) -> Element:
    """One thing of a chart, drawn as ``parts``; ``told`` is shown when the pointer or the keyboard is at it."""
    return e("g", *parts, data_mark=True, tabindex="-1", role="img", aria_label=told)


def shape(kind: str, x: float, y: float, class_: str, size: float = 4.5) -> Element:
    """A shape of ``SHAPES`` around a place; its class has its colour, and "hollow" if it is."""
    return e("path", d=_PATHS[kind](x, y, size), class_=f"mark {class_}")


def legend(entries: Iterator[tuple[str, str, str]]) -> Element:
    """A list of (shape, class, words)."""
    items = []
    for kind, class_, words in entries:
        drawn = shape(kind, 8, 8, class_, 5)
        items.append(e("li", e("svg", drawn, viewBox="0 0 16 16", class_="key", aria_hidden="true"), words))
    return e("ul", *items, class_="legend")


def _corners(*offsets: tuple[float, float]) -> Callable[[float, float, float], str]:
    def path(x: float, y: float, r: float) -> str:
        return "M" + "L".join(f"{x + dx * r:.1f} {y + dy * r:.1f}" for dx, dy in offsets) + "z"

    return path


def _circle(x: float, y: float, r: float) -> str:
    return f"M{x - r:.1f} {y:.1f}a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0z"


_PATHS: dict[str, Callable[[float, float, float], str]] = {
    "circle": _circle,
    "square": _corners((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": _corners((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    "diamond": _corners((0, -1.3), (1.1, 0), (0, 1.3), (-1.1, 0)),
    "down": _corners((0, 1.2), (1.1, -0.8), (-1.1, -0.8)),
    "cross": _corners((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4), (0.4, 1.2),
                      (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
}  # fmt: skip
