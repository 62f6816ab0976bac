"""``benchmarks/simulate.py``: what is committed is what the model says now, and where it stands to the paper."""

import json

from benchmarks.simulate import RATIOS, RESULTS, results


def test_the_committed_results_are_those_of_the_model_as_it_is() -> None:
    kept = json.loads((RESULTS / "simulate.json").read_text())
    kept.pop("constants")
    assert kept == json.loads(json.dumps(results())), "run python benchmarks/simulate.py, and look at what changed"


def test_each_of_the_papers_ratios_is_within_its_bar() -> None:
    rows = results()["ratios: predicted beside published"]
    assert [row["speed-up"] for row in rows] == [what for what, *_ in RATIOS]
    assert all(row["within"] for row in rows)
