from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import nn
from typer.testing import CliRunner

import fxfuse
from fxfuse.cli.commands import app
from fxfuse.report.bug_report import write_trace
from tests.models.tiny import Tower, llama, tokens, vectors


def test_it_writes_what_a_report_needs_and_no_weights(tmp_path: Path) -> None:
    model = llama(2)
    plan = fxfuse.Plan(parallel=[["model.layers.0.mlp", "model.layers.1.mlp"]])

    files = write_trace(model, tmp_path / "report", tokens(), plan=plan, use_cache=False)

    assert set(files) == {path.name for path in (tmp_path / "report").iterdir()}
    text = {name: (tmp_path / "report" / name).read_text() for name in files}
    assert f"torch {torch.__version__.split('+')[0]}" in text["versions.txt"]
    assert "LlamaDecoderLayer" in text["model.txt"]
    assert json.loads(text["config.json"])["hidden_size"] == 32
    assert "float64[1, 7, 32] = call_function" in text["graph_0.txt"]
    assert "# model.layers.1.mlp.down_proj.weight" in text["graph_0.txt"]
    assert re.search("1.mlp +gated_ffn", text["branches.txt"])
    assert "one FFN of width 80" in text["branches.txt"]
    assert fxfuse.Plan.load(tmp_path / "report" / "plan.json") == plan
    assert sum(map(len, text.values())) < 100_000


def test_a_model_that_cannot_be_traced_is_reported_with_its_error(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such head")

    files = write_trace(Broken(), tmp_path, vectors())

    assert set(files) == {"versions.txt", "model.txt", "error.txt"}
    assert "no such head" in (tmp_path / "error.txt").read_text()


def test_the_command_writes_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["explain", "tests.report.test_bug_report:tower", "--trace", str(tmp_path / "made")]
    )

    assert result.exit_code == 0, result.output
    assert "names begin with layers." in result.stdout
    assert (tmp_path / "made" / "graph_0.txt").exists()


def tower() -> tuple[nn.Module, tuple[torch.Tensor], dict[str, object]]:
    return Tower(2), (vectors(),), {}


def test_it_says_why_there_are_several_graphs(tmp_path: Path) -> None:
    class Broken(Tower):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break(msg="a place to stop")
            return x

    write_trace(Broken(2), tmp_path, vectors())

    assert {path.name for path in tmp_path.glob("graph_*")} == {"graph_0.txt", "graph_1.txt", "graph_breaks.txt"}
    assert "a place to stop" in (tmp_path / "graph_breaks.txt").read_text()


def test_a_model_without_a_stream_is_reported_with_what_was_seen(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()

    write_trace(model, tmp_path, vectors())

    assert "nothing is added to a value of its own shape" in (tmp_path / "branches.txt").read_text()
    (seen,) = json.loads((tmp_path / "branches.json").read_text())["seen"]
    assert "2 linear" in seen


def test_a_listing_of_a_model_with_streams_does_not_say_why_there_are_none(tmp_path: Path) -> None:
    write_trace(Tower(2), tmp_path, vectors())

    (header, *_) = (tmp_path / "graph_0.txt").read_text().splitlines()
    assert header.endswith("2 residual")
