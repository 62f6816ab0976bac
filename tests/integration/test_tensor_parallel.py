"""Two and four processes compute what one computes, and all-reduce once for each group."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.integration.tensor_parallel import CASES

TOLERANCE = 1e-8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 4], ids=lambda world: f"{world} processes")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What each process found."""
    world, folder = request.param, tmp_path_factory.mktemp("processes")
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.tensor_parallel", str(folder)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world)
    ]
    try:
        assert [process.wait(900) for process in running] == [0] * world
    finally:
        for process in running:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("name", CASES)
def test_all_processes_compute_what_one_does_with_as_few_all_reduces_as_there_are_groups(
    name: str, found: list[dict[str, list[float]]]
) -> None:
    if name not in found[0]:
        pytest.skip("once is enough")
    for own in found:
        error, reductions = own[name]
        assert error <= TOLERANCE
        assert reductions == CASES[name].left


def test_a_model_that_is_spread_along_the_sequence_follows_the_plan(found: list[dict[str, float]]) -> None:
    assert all(own["sequence"] <= TOLERANCE for own in found)


def test_packed_shards_follow_their_weights(found: list[dict[str, float]]) -> None:
    assert all(own.get("followed", 0) <= TOLERANCE for own in found)


def test_gradients_are_those_of_one_process(found: list[dict[str, list[float]]]) -> None:
    assert all(max(own.get("trained", [0])) <= TOLERANCE for own in found)


def test_a_sharded_model_can_be_pruned(found: list[dict[str, list[float]]]) -> None:
    for own in found[: 2 * ("applied" in found[0])]:
        error, left = own["applied"]
        assert error <= TOLERANCE
        assert left == ["layers.0.attn.q", "layers.3.attn.q"]


def test_two_plans_for_one_model_are_noticed(found: list[dict[str, str]]) -> None:
    if "under two plans" in found[0]:
        assert found[0]["under two plans"] == ""
        assert "process 0 follows another plan for this model" in found[1]["under two plans"]


def test_what_needs_whole_weights_says_so(found: list[dict[str, list[str]]]) -> None:
    for own in found[: 2 * ("refused" in found[0])]:
        linear, record, heal, export = own["refused"]
        assert "PlanError: 'layers.1.attn' cannot be made linear: its projections are spread over several" in linear
        where = "the model's weights are spread over processes (layers.0.attn.q.weight is a DTensor): "
        assert record.startswith(f"RecordError: {where}record it in one process")
        assert heal.startswith(f"HealError: {where}heal it in one process")
        assert export.startswith(f"ExportError: {where}export it in one process")
