from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scipy import stats

from fxfuse.measure.tasks.scores import TaskScore, table

EACH = (1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0)
OTHER = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0)


def score(each: tuple[float, ...]) -> TaskScore:
    return TaskScore("cloze", "acc", sum(each) / len(each), float(stats.sem(each)), len(each), 0.25, each)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_intervals_are_students(confidence: float) -> None:
    one, other = score(EACH), score(OTHER)
    differences = [a - b for a, b in zip(EACH, OTHER, strict=True)]
    expected = stats.ttest_1samp(differences, 0).confidence_interval(confidence)

    assert one.interval(confidence) == pytest.approx(
        stats.t.interval(confidence, len(EACH) - 1, one.score, one.error), abs=1e-12
    )
    assert one.gain(other, confidence) == pytest.approx((0.125, *expected), abs=1e-12)


def test_one_document_says_nothing_of_others() -> None:
    single = TaskScore("cloze", "acc", 1.0, math.nan, 1, None, (1.0,))

    assert all(map(math.isnan, (*single.interval(), *single.gain(single)[1:])))


@pytest.mark.parametrize("other", [replace(score(EACH), task="copying"), replace(score(EACH), each=EACH[:4])])
def test_scores_of_other_documents_are_not_compared(other: TaskScore) -> None:
    with pytest.raises(ValueError, match="same documents"):
        score(EACH).gain(other)
    with pytest.raises(ValueError, match="same documents"):
        replace(score(EACH), each=()).gain(replace(score(EACH), each=()))


def test_the_table_compares_all_with_the_first() -> None:
    text = table({"original": [score(EACH)], "planned": [score(OTHER)], "healed": [score(EACH)]})

    head, line, foot = text.splitlines()
    assert head.split("  ") and "planned - original" in head and "healed - original" in head
    assert "cloze" in line and "0.625 (0.192 .. 1.058)" in line and "-0.125 (" in line and "+0.000 (" in line
    assert "0.95 intervals" in foot
