"""The scores of branches against their depth: what each costs to lose, and how much each adds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.etree.ElementTree import Element

from torch import Tensor

from fxfuse.measure.recording import BranchRecord
from fxfuse.report.page.axis import Axis, axis_of
from fxfuse.report.page.chart import Canvas, canvases, draw, legend, mark, shape
from fxfuse.report.page.markup import e, number
from fxfuse.report.page.subject import LETTERS, WORDS, Subject

SHAPES = {"A": "circle", "F": "square", "L": "triangle", "M": "diamond", "O": "cross"}


def section(subject: Subject) -> Element:
    """A chart for each score that the recording has; marks of dropped branches are hollow."""
    charts: list[Element] = []
    for title, words, values in _scores(subject):
        charts.append(e("h3", title))
        if not any(value > 0 for value in values):
            missing = "Not measured: the recorded model returns no logits." if _unknown(values) else "Nothing above 0."
            charts.append(e("p", missing, class_="hint"))
            continue
        if any(value <= 0 for value in values):
            charts.append(e("p", "Values that are not above 0 stand at the lower edge.", class_="hint"))
        charts += [_chart(canvas, subject, title, words, values) for canvas in canvases(250, 230)]
    told = "What a branch does, against its place in the stream, on a log scale. What is low is cheap to lose."
    return e("section", e("h2", "Scores against depth"), e("p", told), legend(_kinds(subject)), *charts)


def _scores(subject: Subject) -> Iterator[tuple[str, str, list[float]]]:
    """Title, words of the axis and values of each score."""
    recording = subject.recording
    given: list[tuple[str, str, Tensor]] = [
        ("KL if dropped (Puzzle)", "KL, nats per token", recording.kl),
        ("Turn of the stream (LLM-Drop)", "1 - cosine of the stream before and after", 1 - recording.cosine),
        ("Length of the contribution", "|added| / |stream|", recording.norm_ratio),
    ]
    for title, words, values in given:
        yield title, words, [value if math.isfinite(value) else math.nan for value in values.tolist()]


def _unknown(values: list[float]) -> bool:
    return all(math.isnan(value) for value in values)


def _kinds(subject: Subject) -> Iterator[tuple[str, str, str]]:
    for letter in dict.fromkeys(LETTERS[branch.kind] for branch in subject.recording.branches):
        yield SHAPES[letter], f"kind-{letter}", WORDS[letter]
    if subject.plan is not None and subject.plan.drop:
        yield "circle", "kind-A hollow", "hollow: dropped by the plan"


def _chart(canvas: Canvas, subject: Subject, title: str, words: str, values: list[float]) -> Element:
    left, right, top, bottom = canvas.box
    x = Axis(-0.8, len(values) - 0.2, left, right)
    y = axis_of(values, bottom, top, log=True)
    size = min(4.5, max(2.2, 0.4 * (right - left) / len(values)))
    marks = [
        _mark(subject, branch, x(index), y(value), f"{title}: {number(value)}", size)
        for index, (branch, value) in enumerate(zip(subject.recording.branches, values, strict=True))
        if not math.isnan(value)
    ]
    shown = subject.labels if canvas.name == "wide" else subject.numbers

    def label(place: float) -> str:
        return shown[int(place)] if place == int(place) else ""

    return draw(canvas, x, y, ("branch, in stream order", words), title, *marks, label=label)


def _mark(subject: Subject, branch: BranchRecord, x: float, y: float, told: str, size: float) -> Element:
    letter = LETTERS[branch.kind]
    class_ = f"kind-{letter}" + " hollow" * subject.dropped(branch.name)
    return mark(f"{subject.describe(branch)}\n{told}", shape(SHAPES[letter], x, y, class_, size))
