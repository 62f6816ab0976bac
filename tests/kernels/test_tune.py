"""Tuning with a clock that is made up: what is tried, kept, and used."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fxfuse.errors import KernelError
from fxfuse.hardware.configs import COUNTERS, CROWD, LOOP_ROWS, MAX_SPLIT, TABLE, Config, Gemm, candidates
from fxfuse.hardware.gpus import Gpu, find
from fxfuse.hardware.pick import pick
from fxfuse.kernels import gate_up, tune
from fxfuse.kernels.calls import GateUp

H100 = find("h100")
GEMM = Gemm("down", 5, 4096, 16384, torch.bfloat16)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXFUSE_CACHE", str(tmp_path))
    tune._known.cache_clear()
    return tmp_path


def slowest_first(config: Config) -> float:
    """The clock of a world in which the pick is bad: the largest split of the smallest tile is fastest."""
    return config.rows * config.columns / config.split


def test_the_fastest_is_chosen_from_then_on() -> None:
    assert tune.chosen(GEMM, H100) == pick(GEMM, H100)
    best = tune.tune(GEMM, H100, slowest_first)
    assert best == min(tune.options(GEMM, H100), key=slowest_first) != pick(GEMM, H100)
    assert tune.chosen(GEMM, H100) == best
    tune._known.cache_clear()  # another process
    assert tune.chosen(GEMM, H100) == best


def test_it_is_chosen_for_the_tokens_that_it_stands_for_and_nothing_else() -> None:
    best = tune.tune(GEMM, H100, slowest_first)
    assert tune.chosen(replace(GEMM, M=8), H100) == best
    for other in (
        replace(GEMM, M=4),
        replace(GEMM, M=9),
        replace(GEMM, N=4112),
        replace(GEMM, dtype=torch.float16),
        replace(GEMM, aligned=False),
        replace(GEMM, kernel="gate_up"),
    ):
        assert tune.chosen(other, H100) == pick(other, H100)


def test_another_gpu_or_version_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {tune.cache_file(H100), tune.cache_file(find("h200")), tune.cache_file(replace(H100, multiprocessors=114))}
    monkeypatch.setattr(torch, "__version__", "99.0")
    files.add(tune.cache_file(H100))
    monkeypatch.setattr(tune, "source_hash", lambda: "other kernels")
    files.add(tune.cache_file(H100))
    assert len(files) == 5


def test_several_shapes_live_in_one_file(folder: Path) -> None:
    other = replace(GEMM, M=2048)
    tune.tune(GEMM, H100, slowest_first)
    tune.tune(other, H100, lambda config: -slowest_first(config))
    (file,) = folder.iterdir()
    assert len(json.loads(file.read_text())) == 2
    assert tune.chosen(GEMM, H100) != tune.chosen(other, H100)


def test_the_pick_is_tried_first_and_so_wins_ties() -> None:
    assert tune.options(GEMM, H100)[0] == pick(GEMM, H100)
    assert tune.tune(GEMM, H100, lambda config: 1.0) == pick(GEMM, H100)


def test_options_are_the_whole_table_with_every_split() -> None:
    options = tune.options(GEMM, H100)
    assert set(candidates(GEMM, 90)) <= set(options)
    assert {config.split for config in options} == {1, 2, 4, 8, MAX_SPLIT}
    assert {config.split for config in tune.options(replace(GEMM, kernel="gate_up"), H100)} == {1}
    assert {config.split for config in tune.options(replace(GEMM, K=128), H100)} == {1, 2}
    many = replace(GEMM, M=8192, N=16384)
    assert all(config.split == 1 for config in tune.options(many, H100) if config.tiles(many) > COUNTERS)


def test_a_split_has_a_counter_for_every_tile_of_all_that_it_stands_for() -> None:
    """Measured for 513 tokens, used for up to 1024."""
    gpu, gemm = Gpu("B200", 100, 148), Gemm("down", 513, 544, 16384, torch.bfloat16)
    best = tune.tune(gemm, gpu, lambda config: config.rows * config.columns - config.split)
    for tokens in (513, 1024):
        shape = replace(gemm, M=tokens)
        assert tune.chosen(shape, gpu) == best
        assert best.split == 1 or best.tiles(shape) <= COUNTERS


def test_no_workspace_is_larger_than_a_few_tiles_for_each_multiprocessor() -> None:
    many = replace(GEMM, M=8192)
    for config in tune.options(many, H100):
        assert config.split == 1 or config.tiles(many) * config.split <= CROWD * H100.multiprocessors


def test_what_is_measured_is_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles are given the norm's factors; with the sums in their loop they would be other kernels."""
    taken: list[bool] = []

    class Launched:
        def run(self) -> None: ...

    def launch(call: GateUp, config: Config, *rest: object) -> Launched:
        assert (call.eps is None) == (call.rstd is not None)
        taken.append(call.eps is not None)
        return Launched()

    monkeypatch.setattr(gate_up, "launch", launch)
    measure = tune.stopwatch(Gemm("gate_up", 5, 32, 16, torch.bfloat16), torch.device("cpu"))
    configs = [row.config for row in TABLE if row.kernel == "gate_up"]
    for config in configs:
        measure(config)
    assert taken[:: len(taken) // len(configs)] == [config.rows <= LOOP_ROWS for config in configs]


def test_a_damaged_file_says_what_to_do() -> None:
    path = tune.cache_file(Gpu("other", 90, 1))
    path.write_text("{")
    with pytest.raises(KernelError, match="delete it"):
        tune.chosen(GEMM, Gpu("other", 90, 1))
    path.write_text('{"a": {"no": "config"}}')
    with pytest.raises(KernelError, match="delete it"):
        tune.chosen(GEMM, Gpu("other", 90, 1))
