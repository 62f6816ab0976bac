"""The tables of healing: peers that are exact where they can be, and both scripts on models of a second."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse.data.loading import Loaded
from tests.models.tiny import llama

FOLDER = Path(__file__).parents[2] / "benchmarks"


class Bytes:
    def encode(self, text: str) -> list[int]:
        return list(text.encode()[:4096])

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode()


def loaded(*_: object) -> Loaded:
    model = llama(5, torch.float32, vocab_size=256)
    return Loaded(model, Bytes(), (), {"input_ids": torch.ones(1, 4, dtype=torch.int64), "use_cache": False})


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imported as they are when they run: from their own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import healing
    import healing_peers
    import last_ffn

    yield healing, healing_peers, last_ffn
    for name in ("healing", "healing_peers", "last_ffn"):
        sys.modules.pop(name)


def ids(rows: int = 40, length: int = 6) -> Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(3))


def text(length: int) -> list[dict[str, object]]:
    return [{"input_ids": part, "use_cache": False} for part in ids(600 // length, length).split(20)]


def close(student: Any, model: Any, length: int) -> None:
    given = {"input_ids": ids(4, length), "use_cache": False}
    with torch.no_grad():
        torch.testing.assert_close(student(**given).logits, model(**given).logits, rtol=1e-3, atol=1e-3)


def test_nbl_is_exact_where_an_attention_is_linear(scripts: Any) -> None:
    model = llama(4, torch.float32)

    close(scripts[1].nbl(model, [1, 2], text(1)), model, 1)  # of one token, it is


@pytest.mark.parametrize("patch", ["replaceme", "linearpatch"])
def test_blocks_that_do_nothing_are_left_out(scripts: Any, patch: str) -> None:
    model = llama(5, torch.float32)
    with torch.no_grad():
        for layer in (2, 3):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()

    student = scripts[1].skip(model, 2, text(6), patch)

    assert len(student.model.layers) == 3
    close(student, model, 6)


def test_peers_find_the_best_affine_map(scripts: Any) -> None:
    fit = scripts[1].Fit()
    given, map_ = torch.randn(300, 8), torch.randn(8, 8)
    fit.add(given[:200], given[:200] @ map_.T + 3)
    fit.add(given[200:], given[200:] @ map_.T + 3)

    weight, bias = fit.solve()

    torch.testing.assert_close(weight, map_, rtol=0, atol=1e-4)
    torch.testing.assert_close(bias, torch.full((8,), 3.0), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_table_goes_on_where_it_was(scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    healing = scripts[0]
    monkeypatch.setattr(healing, "load", loaded)
    path = tmp_path / "healing.json"
    sizes = "--tokens 768 --judge 128 --record 64 --length 32".split()

    def run(*more: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["healing.py", "--json", str(path), *sizes, *more])
        healing.main()
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
        return rows

    first = run("--plans", "2+1", "1L", "--how", "linear, fit")
    both = run("--plans", "2+1", "1L", "1", "--how", "linear, fit", "NBL", "LinearPatch")

    assert [(row["plan"], row["how"]) for row in first] == [
        ("", "original"),
        ("2+1", "unhealed"),
        ("2+1", "linear, fit"),
        ("1L", "unhealed"),
        ("1L", "linear, fit"),
    ]
    assert both[: len(first)] == first
    assert len(both) == len(first) + 2 + 4
    by_key = {(row["plan"], row["how"]): row for row in both}
    assert by_key["", "original"]["near"]["kl"] == pytest.approx(0, abs=1e-6)
    assert set(by_key["2+1", "linear, fit"]["edits"]["linear"]) == set(by_key["2+1", "unhealed"]["edits"]["drop"])
    assert len(by_key["2+1", "unhealed"]["edits"]["parallel"]) == 1
    for text in ("near", "far"):
        assert by_key["1L", "linear, fit"][text]["kl"] < by_key["1L", "unhealed"][text]["kl"]


def test_runs_of_ffns_with_the_last_in_and_out(scripts: Any) -> None:
    plan = scripts[2].plan_of(4, 3, "last out")

    assert plan.drop == ("model.layers.5.self_attn", "model.layers.6.self_attn")
    assert plan.parallel == (("model.layers.4.mlp", "model.layers.5.mlp"),)
    assert scripts[2].plan_of(4, 3, "first out").parallel == (("model.layers.5.mlp", "model.layers.6.mlp"),)
    assert not scripts[2].plan_of(4, 2, "last out").parallel


@pytest.mark.slow
def test_runs_are_measured_unhealed_and_fitted(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last_ffn, path = scripts[2], tmp_path / "last_ffn.json"
    subject = last_ffn.Subject(llama(4, torch.float32), text(6), text(6)[:1], 1)
    monkeypatch.setattr(last_ffn, "small", lambda *_: subject)
    monkeypatch.setattr(sys, "argv", ["last_ffn.py", "--json", str(path), "--models", "small", "--runs", "2"])
    last_ffn.main()

    rows = json.loads(path.read_text())["rows"]
    assert [(row["fit"], row["group"]) for row in rows] == [(fit, g) for fit in (False, True) for g in ("none", "all")]
    assert rows[2]["kl"] < rows[0]["kl"] and rows[3]["kl"] < rows[1]["kl"]
    assert f"| {rows[0]['kl']:.4f} | {rows[1]['kl']:.4f} |" in capsys.readouterr().out
