"""``make gpu``, rehearsed: all parts on tiny shapes, without a GPU; and what becomes of parts that go wrong."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import ahead, results, whole
from benchmarks.gpu.bench import REHEARSED, Bench, Card, Emit
from benchmarks.gpu.children import asked
from benchmarks.gpu.micro import SIZES
from benchmarks.gpu.models import COLUMNS, LLAMA_8B, plan
from benchmarks.gpu.tiles import beside, row_of
from benchmarks.gpu.whole import Part
from fxfuse.hardware.configs import TABLE, Gemm
from fxfuse.hardware.gpus import find

ROOT = Path(__file__).parents[2]


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "gpu-rehearsal.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_rehearsal_goes_through_all_parts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "60", "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    found = rows(tmp_path)
    parts = {key: [row for row in found if row["part"] == key] for key in "abcde"}
    assert {"copy", "GEMM"} <= {row.get("what") for row in parts["a"]}
    assert {row["outcome"] for row in parts["b"] if "test" in row} == {"passed", "skipped"}
    assert {row["kernel"] for row in parts["c"] if "us" in row} == {"K1", "K2", "FFN", "FFN, forward and backward"}
    assert {row["by"] for row in parts["c"] if "us" in row} == {"fxfuse", "inductor", "max-autotune"}
    assert {(row["phase"], row["column"]) for row in parts["d"] if "ms" in row} == {
        (phase, column) for phase in ("decode", "prefill") for column in [*COLUMNS][::2]
    }
    assert {row["kernel"] for row in parts["e"] if "best us" in row} == {"gate_up", "down"}
    assert not [row for row in found if "error" in row or "cut" in row]
    lines = list(csv.DictReader((tmp_path / "gpu-rehearsal.csv").read_text().splitlines()))
    assert len(lines) == len(found)
    assert "rows by how often they are the fastest" in done.stdout.rpartition("\nc\n")[2]


def fails(bench: Bench, emit: Emit) -> None:
    emit({"what": "done before"})
    raise ValueError("no luck")


def hangs(bench: Bench, emit: Emit) -> None:
    emit({"what": "done before"})
    time.sleep(600)


def dies(bench: Bench, emit: Emit) -> None:
    emit({"what": "done before"})
    os._exit(6)


def works(bench: Bench, emit: Emit) -> None:
    emit({"what": "done", "earlier": len(bench.rows)})


@pytest.mark.parametrize(
    ("part", "error"), [(fails, "ValueError: no luck"), (hangs, "ended after"), (dies, "ended with 6")]
)
def test_a_part_that_goes_wrong_leaves_what_it_did_and_the_next_one_runs(
    part: object, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "PARTS", {"a": Part(part, 1), "b": Part(works, 1)})
    monkeypatch.setattr(whole, "GRACE", 0.1)

    assert not whole.run(tmp_path, ["a", "b"], 4 / 60, rehearsed=True)

    first, second = ([row for row in rows(tmp_path) if row["part"] == key] for key in "ab")
    assert [row["what"] for row in first if "what" in row] == ["done before"]
    assert error in next(str(row["error"]) for row in first if "error" in row)
    assert second[-1]["what"] == "done"


def test_parts_that_are_not_run_again_keep_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "PARTS", {"a": Part(works, 1), "b": Part(works, 1)})
    assert whole.run(tmp_path, ["a", "b"], 1, rehearsed=True)
    assert whole.run(tmp_path, ["b"], 1, rehearsed=True)
    assert [row["part"] for row in rows(tmp_path) if "what" in row] == ["a", "b"]


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"part": "a"}\n{"part": "b", "us"')
    assert results.read(tmp_path / "lines") == [{"part": "a"}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_rehearsal_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--rehearse"):
        whole.run(tmp_path / "none", ["a"], 1, rehearsed=False)
    assert not (tmp_path / "none").exists()


def test_ceilings_are_what_was_measured() -> None:
    measured = ({"what": "copy", "GB/s": 3000.0}, {"what": "GEMM", "TFLOP/s": 800.0})
    assert Bench(REHEARSED, 0, measured).ceilings.bandwidth == 3e12
    assert Bench(REHEARSED, 0, measured).ceilings.half_flops == 8e14
    assert Bench(REHEARSED, 0, measured[:1]).ceilings == REHEARSED.gpu


def test_a_process_that_gives_no_answer_is_an_error() -> None:
    assert asked(os.getpid, 20) != os.getpid()
    with pytest.raises(RuntimeError, match="no answer"):
        asked(lambda: os._exit(3), 20)
    with pytest.raises(RuntimeError, match="no answer"):
        asked(lambda: time.sleep(60), 0.2)


def test_every_kernel_of_every_shape_is_compiled_ahead_once() -> None:
    bench = Bench(Card(find("h100"), 0), 0)
    launches = [each for d, f, n in SIZES for tokens in SIZES.tokens for each in ahead.of_ops(bench, d, n * f, tokens)]
    different = {ahead._key(launch) for launch in launches}
    assert 10 < len(different) < 60 < len(launches)


@pytest.mark.slow
def test_what_is_compiled_ahead_is_found_later(tmp_path: Path) -> None:
    """By another process with the same launch: Triton's cache has it already."""
    code = (
        "import sys, time\n"
        "from benchmarks.gpu import ahead\n"
        "from benchmarks.gpu.bench import Bench, Card\n"
        "from fxfuse.hardware.gpus import find\n"
        "bench = Bench(Card(find('h100'), 0), time.monotonic() + 200)\n"
        "ahead.compile_ahead(bench, ahead.of_ops(bench, 64, 256, int(sys.argv[1]))[:1])\n"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}

    def compiled(tokens: str) -> set[Path]:
        subprocess.run([sys.executable, "-c", code, tokens], cwd=ROOT, env=environment, check=True)
        return set(tmp_path.rglob("*.cubin"))

    first = compiled("3")
    assert len(first) == 1
    assert compiled("5") == first


def test_the_plan_of_llama_fuses_fours_of_the_middle_half() -> None:
    made = plan(LLAMA_8B.layers, fuse=True)
    assert [len(group) for group in made.parallel] == [4] * 4
    assert len(made.drop) == 12
    assert made.parallel[0][0] == "model.layers.8.mlp"
    assert made.drop[:1] == ("model.layers.9.self_attn",)
    assert LLAMA_8B.weight_bytes == pytest.approx(2 * 8.03e9, rel=0.01)


def test_the_best_config_is_written_as_a_line_of_the_table() -> None:
    gemm = Gemm("down", 16, 4096, 14336, torch.bfloat16)
    row = next(row for row in TABLE if row.kernel == "down" and 90 in row.arch and row.aligned and row.bits == 16)
    text = row_of(gemm, row.config, 90)
    assert eval(text.rstrip(","), {"Row": type(row), "Config": type(row.config)}).config == row.config
    assert all(row_of(gemm, config, 90).endswith("# new") for config in beside(row.config))
