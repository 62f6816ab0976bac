from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.errors import ReportError
from fxfuse.report.page import Result, load_results, render
from fxfuse.report.page.axis import axis_of
from fxfuse.report.page.results import front
from tests.report.page.pages import RESULTS, Node, layers, read, section

GOOD = {"name": "a", "solver": "s", "latency": 0.04, "kl": 0.1}
positive = st.floats(1e-6, 1e6)


def alternatives(results: tuple[Result, ...] | list[Result]) -> Node:
    return section(read(render(layers(2), results=results)), "The plan against alternatives")


def test_a_file_of_results_is_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    healed = {**GOOD, "latency": 1, "healed_kl": 0.05, "chosen": True}
    path.write_text(json.dumps([GOOD, healed, {**GOOD, "kl": -1e-9}]))

    found = load_results(path)

    assert [(r.latency, r.healed_kl, r.best_kl, r.chosen) for r in found] == [
        (0.04, None, 0.1, False),
        (1.0, 0.05, 0.05, True),
        (0.04, None, -1e-9, False),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[{", "not JSON"),
        ("\xff", "not JSON"),
        ("{}", "a list of"),
        (json.dumps([GOOD, {"name": "a"}]), r"entry \[1\]\.solver"),
        (json.dumps([{**GOOD, "latency": 0}]), r"entry \[0\]\.latency.*greater than 0"),
        (json.dumps([{**GOOD, "latency": math.nan}]), r"entry \[0\]\.latency"),
        (json.dumps([{**GOOD, "kl": -1}]), r"entry \[0\]\.kl"),
        (json.dumps([{**GOOD, "kl": "0.1"}]), r"entry \[0\]\.kl"),
        (json.dumps([{**GOOD, "healed_KL": 0.1}]), "healed_KL"),
        (json.dumps([{**GOOD, "name": ""}]), r"entry \[0\]\.name"),
    ],
)
def test_what_is_no_result_is_an_error_that_names_it(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))

    with pytest.raises(ReportError, match=message):
        load_results(path)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_the_front_is_what_no_other_beats(points: list[tuple[int, int]]) -> None:
    def beaten(one: tuple[int, int]) -> bool:
        return any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)

    assert front([(float(x), float(y)) for x, y in points]) == sorted({one for one in points if not beaten(one)})


def test_candidates_are_drawn_before_and_after_healing_and_the_chosen_one_ringed() -> None:
    for chart in alternatives(RESULTS).all("svg", "chart"):
        marks = [group for group in chart.all("g") if "data-mark" in group.attributes]
        told = [mark.attributes["aria-label"].split("\n") for mark in marks]
        assert [lines[0] for lines in told] == ["best", "cheap", "poor", "as it was"]
        assert told[0][1:] == ["by search, chosen", "35 ms", "KL 0.07 nats per token unhealed", "KL 0.03 healed"]
        shapes = [mark.all("path") for mark in marks]
        assert [["hollow" in shape.classes for shape in pair] for pair in shapes] == [[False, True]] * 3 + [[True]]
        assert all(center(healed)[1] > center(unhealed)[1] for healed, unhealed in shapes[:3])
        (ring,) = chart.all("circle", "ring")
        at = (float(ring.attributes["cx"]), float(ring.attributes["cy"]))
        assert at == pytest.approx(center(shapes[0][0]), abs=1.2)


def center(mark: Node) -> tuple[float, float]:
    """Half way between the edges of a shape."""
    corners = [[float(place) for place in corner.split()] for corner in mark.attributes["d"].strip("Mz").split("L")]
    xs, ys = zip(*corners, strict=True)
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2


def test_solvers_differ_in_shape_and_in_colour() -> None:
    results = [Result(name=f"{i}", solver=f"{i}", latency=0.1, kl=0.1) for i in range(6)]

    keys = [item.all("path")[0] for item in alternatives(results).all("ul")[0].all("li")]

    assert len({key.attributes["d"] for key in keys}) == len({key.classes[1] for key in keys}) == 6


def test_the_table_has_the_best_and_all_of_them_lie_folded_below() -> None:
    best, every = (table.all("tbody")[0].all("tr") for table in alternatives(RESULTS).all("table"))

    assert [row.all("td")[0].words for row in best] == ["best (chosen)", "as it was"]
    assert [row.all("td")[0].words for row in every] == ["best (chosen)", "cheap", "poor", "as it was"]
    assert [cell.words for cell in every[1].all("td")] == ["cheap", "greedy", "36", "0.09", "0.05", "1.029"]
    assert "marked" in best[0].classes and "marked" not in every[1].classes


def test_a_KL_of_0_on_a_logarithmic_axis_is_said_to_stand_at_its_edge() -> None:  # noqa: N802
    costly = RESULTS[1].model_copy(update={"kl": 9.0})

    assert "KL of 0 stands at the lower edge" not in alternatives(RESULTS).words
    assert "KL of 0 stands at the lower edge" in alternatives([*RESULTS, costly]).words


@given(values=st.lists(positive, min_size=1, max_size=5), log=st.booleans(), count=st.integers(5, 9))
def test_an_axis_holds_its_values_and_has_a_few_round_ticks(values: list[float], log: bool, count: int) -> None:
    axis = axis_of(values, 100.0, 0.0, log=log)

    assert axis.low < min(values) and max(values) < axis.high
    places = [axis(value) for value in sorted(values)]
    assert places == sorted(places, reverse=True) and 0 <= min(places) <= max(places) <= 100
    ticks = axis.ticks(count)
    assert 2 <= len(ticks) <= 2 * count and ticks == sorted(set(ticks))
    assert all(axis.low <= tick <= axis.high for tick in ticks)
    assert all(float(f"{tick:.6g}") == pytest.approx(tick, abs=1e-5 * axis.high) for tick in ticks)
