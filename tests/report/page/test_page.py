"""The page as a whole: what it shows of what there is, whatever names are, and that it is one file."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given

from fxfuse import Plan, PlanError, Recording
from fxfuse.errors import OptionError
from fxfuse.measure.recording import GroupRecord
from fxfuse.plan import Decision
from fxfuse.report.page import Result, render, save_report
from tests.planning.recordings import recording as written
from tests.planning.recordings import recordings
from tests.report.page.pages import RESULTS, distances, layers, plan_of_layers, read, section

PLAN, ALTERNATIVES, WHY = "The plan", "The plan against alternatives", "Why each edit was made or refused"
MATRIX, SCORES, GROUPS = "Which branches depend on which", "Scores against depth", "Groups that were measured"


def titles(page: str) -> list[str]:
    return [heading.text for heading in read(page).all("h2")]


def test_a_recording_alone_gives_the_first_half() -> None:
    assert titles(render(layers(6))) == [MATRIX, SCORES, "All scores", "Provenance"]


def test_a_plan_and_results_have_sections_of_their_own() -> None:
    recorded = replace(layers(6), groups=(GroupRecord(("model.layers.1.mlp", "model.layers.2.mlp"), 0.1, 0.2, 3, 2.2),))

    page = render(recorded, plan_of_layers(), RESULTS)

    assert titles(page) == [PLAN, ALTERNATIVES, MATRIX, SCORES, GROUPS, WHY, "All scores", "Provenance"]
    assert "1.mlp + 2.mlp" in section(read(page), GROUPS).words


@given(recorded=recordings().filter(lambda recorded: recorded.branches))
def test_any_recording_makes_a_well_formed_page_that_tells_of_each_branch(recorded: Recording) -> None:
    plan = Plan(drop=[recorded.branches[0].name])

    page = render(recorded, plan)

    root = read(page)
    for svg in re.findall("<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    told = [mark.attributes["aria-label"].split("\n")[0] for mark in section(root, PLAN).all(class_="branch")
            if "aria-label" in mark.attributes]  # fmt: skip
    assert sorted(told) == sorted(branch.name for branch in recorded.branches)


HOSTILE = (
    "</script><script>window.broken = 1</script>",
    '"><img src=x onerror="window.broken = 1">',
    "<!--<script>",
    "]]>&lt;b&amp;",
    "\x00\x1b\ud800end",
    "'); window.broken = 1; ('",
)


def hostile() -> tuple[Recording, Plan, list[Result]]:
    """Whatever a file may hold for a name, wherever a page shows one."""
    recorded = layers(3)
    branches = tuple(replace(b, name=name, reason=name) for b, name in zip(recorded.branches, HOSTILE, strict=True))
    why = [Decision("parallel", HOSTILE[1:3], "refused", HOSTILE[0], 0.1)]
    results = [Result(name=name, solver=name, latency=0.1 + i, kl=0.1) for i, name in enumerate(HOSTILE[:4])]
    groups = (GroupRecord(HOSTILE[3:5], 0.1, 0.1, 0.1, 0.1),)
    texts = {"shapes": HOSTILE[0], "weights": HOSTILE[1], "date": HOSTILE[2], HOSTILE[0]: HOSTILE[1]}
    plan = Plan(drop=[HOSTILE[0]], parallel=[HOSTILE[1:4]], why=why)
    return replace(recorded, branches=branches, groups=groups, model=texts, made=texts), plan, results


def test_names_stay_text() -> None:
    root = read(render(*hostile()))

    plain = read(render(layers(3), Plan(drop=["model.layers.0.attn"]), RESULTS))
    assert {node.tag for node in root.all()} <= {node.tag for node in plain.all()} | {"li", "span", "tr", "td", "th"}
    assert len(root.all("script")) == 2
    assert not any(name.startswith("on") or name in ("src", "href") for n in root.all() for name in n.attributes)
    assert distances(root)["names"][:4] == list(HOSTILE[:4])
    told = {mark.attributes["aria-label"].split("\n")[0] for mark in root.all(class_="branch")
            if "aria-label" in mark.attributes}  # fmt: skip
    assert told >= set(HOSTILE[:4])
    assert HOSTILE[0] in section(root, WHY).words


def test_it_asks_for_nothing_and_runs_no_script_but_its_own() -> None:
    page = render(layers(3))

    root = read(page)
    assert "url(" not in page and "@import" not in page and "http" not in "".join(s.text for s in root.all("script"))
    (policy,) = (meta.attributes["content"] for meta in root.all("meta") if "http-equiv" in meta.attributes)
    assert policy.startswith("default-src 'none'; ")
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)


def test_252_branches_are_less_than_5_megabytes(tmp_path: Path) -> None:
    recorded = layers(126)
    mean = torch.exp2(-9 + 8.5 * torch.rand(252, 252, generator=torch.Generator().manual_seed(0))).triu(1)

    save_report(replace(recorded, mean=mean, p99=mean * 1.7, max=mean * 3), tmp_path / "page.html", plan_of_layers())

    assert 500_000 < (tmp_path / "page.html").stat().st_size < 5_000_000


def test_scores_that_were_not_measured_are_said_to_be_missing() -> None:
    recorded = layers(3)
    bare = replace(recorded, kl=torch.full((6,), math.nan), norm_ratio=torch.zeros(6))

    scores = section(read(render(bare)), SCORES)

    assert "returns no logits" in scores.words and "Nothing above 0" in scores.words
    assert len(scores.all(class_="chart")) == 2  # one score, wide and narrow
    assert "not measured" in section(read(render(bare)), "All scores").words


def test_decisions_are_shown_in_their_order_with_reasons_and_those_never_measured_are_folded() -> None:
    shown = section(read(render(layers(6), plan_of_layers())), WHY)

    tables = [[[cell.words for cell in row.all("td")] for row in body.all("tr")] for body in shown.all("tbody")]
    assert tables == [
        [["kept", "drop", "2.attn", "0.01", "0.01", "0.01", "adds 0.01; it may add 0.02"]],
        [["refused", "parallel", "0.mlp + 1.mlp", "0.3", "", "", "recorded to add 2.2 by itself"]],
    ]
    assert len(shown.all("details")) == 1


def test_provenance_is_that_of_the_recording() -> None:
    words = section(read(render(layers(3))), "Provenance").words

    assert all(part in words for part in ("a" * 64, "b" * 64, "1,024", "2026-11-28", "fxfuse 0.1.0, torch 2.13.0"))
    assert "not recorded" in section(read(render(written("af"))), "Provenance").words


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"no branch 'model\.layers\.9\.mlp'.*nearest"):
        render(layers(3), Plan(drop=["model.layers.9.mlp"]))
    with pytest.raises(OptionError, match="no branches"):
        render(written(""))


def test_what_was_dropped_before_recording_is_named_and_not_drawn() -> None:
    plan = Plan(drop=["a9"])

    drawn = section(read(render(written("af", plan=plan), plan)), PLAN)

    assert "not drawn: a9" in drawn.words
    assert len(drawn.all("ol")[0].all(class_="branch")) == 2
