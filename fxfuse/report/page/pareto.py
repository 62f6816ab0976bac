"""The candidates of a search by latency and KL, before and after healing: a picture, and the same as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

from fxfuse.report.page.axis import Axis, axis_of
from fxfuse.report.page.chart import COLOURS, SHAPES, Canvas, canvases, draw, legend, mark, shape
from fxfuse.report.page.markup import e, number
from fxfuse.report.page.results import Result, front
from fxfuse.report.page.tables import Cell, table

WIDE_RANGE = 20
"""From this ratio of the largest KL to the smallest on, the axis is logarithmic."""


def section(results: Sequence[Result]) -> Element:
    """The candidates, those that no other beats in both joined by a line."""
    told = "Hollow marks are unhealed, full ones healed; a thin line joins the two of one candidate. " if any(
        result.healed_kl is not None for result in results
    ) else "Nothing here was healed. "  # fmt: skip
    told += "Stepped lines pass through the candidates that none beats in both; a ring is the candidate chosen."
    told += " A KL of 0 stands at the lower edge." * (_logarithmic(results) and min(r.kl for r in results) <= 0)
    charts = [_chart(canvas, results) for canvas in canvases(420, 360)]
    return e(
        "section",
        e("h2", "The plan against alternatives"),
        e("p", told),
        legend(_solvers(results)),
        *charts,
        *_tables(results),
    )


def _styles(results: Sequence[Result]) -> dict[str, tuple[str, str]]:
    """A shape and a colour for each solver."""
    solvers = dict.fromkeys(result.solver for result in results)
    return {solver: (SHAPES[i % len(SHAPES)], f"s{i % COLOURS}") for i, solver in enumerate(solvers)}


def _solvers(results: Sequence[Result]) -> Iterator[tuple[str, str, str]]:
    for solver, (kind, colour) in _styles(results).items():
        yield kind, colour, solver


def _axes(canvas: Canvas, results: Sequence[Result]) -> tuple[Axis, Axis]:
    left, right, top, bottom = canvas.box
    costs = [kl for result in results for kl in (result.kl, result.best_kl)]
    log = _logarithmic(results)
    x = axis_of([result.latency * 1e3 for result in results], left, right)
    return x, axis_of(costs if log else [0.0, *costs], bottom, top, log=log)


def _logarithmic(results: Sequence[Result]) -> bool:
    positive = [kl for result in results for kl in (result.kl, result.best_kl) if kl > 0]
    return bool(positive) and max(positive) > WIDE_RANGE * min(positive)


def _chart(canvas: Canvas, results: Sequence[Result]) -> Element:
    x, y = _axes(canvas, results)
    styles = _styles(results)
    marks = []
    for result in sorted(results, key=lambda result: result.latency):
        kind, colour = styles[result.solver]
        at, parts = x(result.latency * 1e3), list[Element]()
        if result.chosen:
            parts.append(e("circle", cx=at, cy=y(result.best_kl), r=11, class_="ring"))
        if result.healed_kl is not None:
            parts.append(e("line", x1=at, x2=at, y1=y(result.kl), y2=y(result.healed_kl), class_=f"link {colour}"))
            parts.append(shape(kind, at, y(result.healed_kl), colour, 5.5))
        parts.append(shape(kind, at, y(result.kl), f"{colour} hollow"))
        marks.append(mark(_told(result), *parts))
    unhealed = [(result.latency, result.kl) for result in results]
    healed = [(result.latency, result.healed_kl) for result in results if result.healed_kl is not None]
    steps = [_step(x, y, unhealed, "front"), _step(x, y, healed, "front healed")]
    words = ("latency, ms", f"KL to the original, nats per token{', log scale' if y.log else ''}")
    return draw(canvas, x, y, words, "Latency and KL of candidates", *steps, *marks)


def _step(x: Axis, y: Axis, points: list[tuple[float, float]], class_: str) -> Element:
    """A line that at each latency shows the least KL to be had for it or less."""
    path = ""
    for latency, kl in front(points):
        path += f"H{x(latency * 1e3):.1f}V{y(kl):.1f}" if path else f"M{x(latency * 1e3):.1f} {y(kl):.1f}"
    return e("path", d=path and f"{path}H{x.end:.1f}", class_=class_)


def _told(result: Result) -> str:
    lines = [result.name, f"by {result.solver}{', chosen' if result.chosen else ''}"]
    lines += [f"{result.latency * 1e3:.4g} ms", f"KL {number(result.kl)} nats per token unhealed"]
    return "\n".join([*lines, *([f"KL {number(result.healed_kl)} healed"] if result.healed_kl is not None else [])])


def _tables(results: Sequence[Result]) -> list[Element]:
    """The candidates that matter, and all of them, if there are others."""
    unbeaten = set(front([(result.latency, result.best_kl) for result in results]))

    def unbeaten_one(result: Result) -> bool:
        return (result.latency, result.best_kl) in unbeaten

    ranked = sorted(results, key=lambda result: result.latency)
    best = [result for result in ranked if result.chosen or unbeaten_one(result)]
    made = [_table("Chosen or beaten by none in both, fastest first; KL in nats per token", best, results)]
    if len(best) < len(ranked):
        every = _table("All, fastest first; KL in nats per token", ranked, results)
        made.append(e("details", e("summary", f"all {len(ranked)} candidates"), every))
    return made


def _table(caption: str, shown: Sequence[Result], results: Sequence[Result]) -> Element:
    chosen = [result for result in results if result.chosen]
    head = ["candidate", "solver", "latency, ms", "KL unhealed", "KL healed"]
    head += ["latency to the chosen"] * (len(chosen) == 1)
    rows: list[list[Cell]] = []
    for result in shown:
        row: list[Cell] = [f"{result.name} (chosen)" if result.chosen else result.name, result.solver]
        row += [f"{result.latency * 1e3:.4g}", number(result.kl)]
        row += ["" if result.healed_kl is None else number(result.healed_kl)]
        rows.append([*row, f"{result.latency / chosen[0].latency:.3f}"] if len(chosen) == 1 else row)
    return table(caption, head, rows, [result.chosen for result in shown])
