"""``fxfuse report``, as typed by a user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxfuse import Plan
from tests.cli.test_main import run
from tests.report.page.pages import RESULTS, layers, plan_of_layers, read, section


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "recording.safetensors"
    layers(6).save(path)
    return path


def test_a_recording_a_plan_and_results_make_a_page(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, results, output = tmp_path / "plan.json", tmp_path / "results.json", tmp_path / "page.html"
    plan_of_layers().save(plan)
    results.write_text(json.dumps([result.model_dump() for result in RESULTS]))

    code, out, err = run(
        capsys, "report", str(recorded), "--plan", str(plan), "--results", str(results), "-o", str(output)
    )

    assert (code, out) == (0, f"written to {output}\n"), err
    page = read(output.read_text())
    assert section(page, "The plan").all("li", "group")
    assert "best (chosen)" in section(page, "The plan against alternatives").words


def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, output = tmp_path / "plan.json", tmp_path / "page.html"
    Plan(drop=["model.layers.9.attn"]).save(plan)
    for arguments, message in (
        ((str(tmp_path / "none"),), "there is no recording"),
        ((str(recorded), "--plan", str(plan)), "no branch 'model.layers.9.attn'"),
        ((str(recorded), "--results", str(tmp_path / "none")), "cannot be read"),
        ((str(recorded), "--results", str(plan)), "a list of"),
    ):
        code, _, err = run(capsys, "report", *arguments, "-o", str(output))
        assert (code, output.exists()) == (1, False)
        assert err.startswith("fxfuse: ") and message in err and len(err.splitlines()) == 1

    content = recorded.read_bytes()
    code, _, err = run(capsys, "report", str(recorded), "-o", str(recorded))
    assert code == 1 and "read by this very command" in err
    assert recorded.read_bytes() == content
