"""``fxfuse kernels``."""

import json

import pytest
import torch

from tests.cli.test_main import run


def test_the_table_says_that_it_is_modelled_and_for_which_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "kernels", "--gpu", "a100", "--tokens", "1")
    assert code == 0
    assert out.startswith("modelled, NVIDIA A100 80GB SXM\n")
    assert "modelled, kernel by kernel, NVIDIA A100 80GB SXM\n" in out
    assert "measured" not in out
    assert [line.split()[:3] for line in out.splitlines() if line.strip().startswith("1 ")] == [
        ["1", "sequential", "16"],
        ["1", "fused", "2"],
        ["1", "gate_up", "16x32x128"],
        ["1", "down", "16x32x128"],
    ]


def test_json_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "kernels", "--tokens", "32", "--tokens", "1", "--tensor-parallel", "8", "--json")
    lines = json.loads(out)["modelled"]
    assert code == 0
    assert [(line["tokens"], line["FFNs"], line["all-reduces"]) for line in lines] == [
        (1, "sequential", 4),
        (1, "fused", 1),
        (32, "sequential", 4),
        (32, "fused", 1),
    ]
    assert lines[1]["speed-up"] == pytest.approx(lines[0]["us"] / lines[1]["us"], abs=0.01)


def test_each_kernel_has_its_distance_to_the_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "kernels", "--tokens", "1", "--tokens", "2048", "--json")
    results = json.loads(out)
    lines = results["kernels"]
    assert [(line["tokens"], line["kernel"], line["loads"]) for line in lines] == [
        (1, "gate_up", "pointers"),
        (1, "down", "pointers"),
        (2048, "gate_up", "TMA"),
        (2048, "down", "TMA"),
    ]
    assert all(0.5 < line["of roofline"] < 1 for line in lines)
    fused = results["modelled"][1]
    assert sum(line["us"] for line in lines[:2]) == pytest.approx(fused["us"], abs=0.2)


def test_compile_shows_what_is_launched(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--gpu h100 --hidden 1024 --width 4096 --tokens 512 --compile --json".split()
    _, out, _ = run(capsys, "kernels", *arguments)
    lines = json.loads(out)["compiled"]
    assert [line["kernel"] for line in lines] == ["rstd.kernel", "gate_up.tma_kernel", "down.tma_kernel"]
    assert all(line["registers"] > 0 and line["spilled bytes"] == 0 for line in lines)
    assert "wgmma" in lines[1]["instructions"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_tune_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "kernels", "--tune")
    assert code == 1
    assert "there is no GPU here" in err
    assert out == ""


def test_an_unknown_gpu_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "kernels", "--gpu", "tpu")
    assert code == 1
    assert "a100, a10, a6000, h100, h200" in err
