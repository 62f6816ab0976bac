from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fxfuse
from fxfuse.errors import ExportError, OptionError, PlanError
from fxfuse.exporting import tensors
from fxfuse.exporting.folder import new_folder
from fxfuse.exporting.tensors import write_weights
from fxfuse.exporting.weights import Weight, filled, stacked
from tests.exporting.families import difference, loaded, tiny

PLAN = fxfuse.Plan(drop=["model.layers.2.self_attn"], parallel=[["model.layers.1.mlp", "model.layers.2.mlp"]])


def weights() -> dict[str, Weight]:
    made = {f"w{index}": torch.randn(3, index + 1).to(dtype) for index, dtype in enumerate(
        (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
    )}  # fmt: skip
    return {name: Weight.own(tensor, name) for name, tensor in made.items()}


@pytest.mark.parametrize("shard", [10_000, 100, 1])
def test_streamed_files_are_what_the_library_reads(shard: int, tmp_path: Path) -> None:
    given = weights()

    write_weights(tmp_path, given, shard)

    files = sorted(tmp_path.glob("*.safetensors"))
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == given.keys()
    assert all(torch.equal(read[name], given[name]()) for name in given)
    assert (len(files) == 1) == (shard == 10_000)
    if len(files) > 1:
        places = json.loads((tmp_path / tensors.INDEX).read_text())["weight_map"]
        for name, file in places.items():
            with safe_open(tmp_path / file, "pt") as opened:
                assert name in opened.keys()  # noqa: SIM118  # it is no mapping


def test_stacked_weights_end_in_exact_zeros() -> None:
    one, other = Weight.own(torch.ones(2, 3), "a"), filled(2.0, (1, 3), torch.float32)

    made = stacked([one, other], 0, 2)

    assert made.shape == (5, 3)
    assert made().tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] + [[0.0] * 3] * 2


def test_a_folder_that_fails_is_not_there(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "config.json").write_text("{}")
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, weight: Weight) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensors, "_write_one", full)

    with pytest.raises(ExportError, match="the disk is full"):
        fxfuse.export(tiny("llama"), PLAN, tmp_path / "out", "nemotron-nas", check=False)

    assert not list(tmp_path.iterdir())


def test_what_is_there_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")

    with pytest.raises(ExportError, match="overwrite=True"):
        fxfuse.export(tiny("llama"), PLAN, out, "nemotron-nas")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]

    fxfuse.export(tiny("llama"), PLAN, out, "nemotron-nas", overwrite=True, check=False)
    assert not (out / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_plan_and_provenance_lie_beside_the_weights(tmp_path: Path) -> None:
    folder = fxfuse.export(tiny("llama"), PLAN, tmp_path / "out", "nemotron-nas", check=False)

    assert fxfuse.Plan.load(folder / "plan.json") == PLAN
    told = json.loads((folder / "fxfuse.json").read_text())
    assert told["plan"] == PLAN.digest
    assert told["class"] == "LlamaForCausalLM"
    assert (folder / "generation_config.json").is_file()


def test_what_is_no_format_no_option_or_no_plan_of_the_model_is_said(tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(ExportError, match="nearest: nemotron-nas"):
        fxfuse.export(model, PLAN, tmp_path / "out", "nemotron")
    with pytest.raises(OptionError, match="quantise"):
        fxfuse.export(model, PLAN, tmp_path / "out", "nemotron-nas", quantise=True)
    with pytest.raises(PlanError, match="no branch"):
        fxfuse.export(model, fxfuse.Plan(parallel=[["model.layers.1.mlp", "model.layers.9.mlp"]]), tmp_path / "out")
    for name in ("model.layers.9.self_attn", "lm_head"):  # one of another model, and a module that is no branch
        with pytest.raises(PlanError, match="no branch"):
            fxfuse.export(model, fxfuse.Plan(drop=[name]), tmp_path / "out")
    with pytest.raises(ExportError, match="there is no folder"):
        fxfuse.export(model, PLAN, tmp_path / "nowhere" / "out")
    with pytest.raises(ExportError, match="save_pretrained"):
        fxfuse.export(model, PLAN, tmp_path / "out", tokenizer=object())
    with pytest.raises(ExportError, match="no language model of Hugging Face"):
        fxfuse.export(torch.nn.Linear(2, 2), PLAN, tmp_path / "out")
    assert not list(tmp_path.iterdir())


_KILLED = """
import os, random, sys
import fxfuse
from fxfuse.exporting import folder as folders
from fxfuse.exporting import tensors
from tests.exporting.families import tiny
from tests.exporting.test_folder import PLAN

folder, seed = sys.argv[1], int(sys.argv[2])
model = tiny("llama")
for moment in random.Random(seed).sample(range(55), 10):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else None
        print(moment, names and os.path.isfile(f"{folder}/config.json"), flush=True)
        continue
    write, made = tensors._write_one, [0]

    def counting(file, weight):
        write(file, weight)
        file.flush()
        made[0] += 1
        if made[0] == moment:
            os._exit(9)

    tensors._write_one = counting
    fxfuse.export(model, PLAN, folder, "nemotron-nas", overwrite=True, check=False)
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("there_before", [False, True], ids=["new", "replaced"])
def test_killed_at_random_moments_it_leaves_no_folder_that_loads_wrong(there_before: bool, tmp_path: Path) -> None:
    out, model = tmp_path / "out", tiny("llama")
    if there_before:
        fxfuse.export(model, PLAN, out, "nemotron-nas", check=False)

    told = subprocess.run(
        [sys.executable, "-c", _KILLED, str(out), str(int(there_before))], capture_output=True, text=True, check=True
    )

    lines = [line.split() for line in told.stdout.splitlines() if line[:1].isdigit()]
    killed = [line for line in lines if int(line[0]) <= _written()]
    assert len(lines) == 10
    assert len(killed) >= 5
    first_whole = next((index for index, line in enumerate(lines) if int(line[0]) > _written()), len(lines))
    wanted = "True" if there_before else "None"
    assert all(line[1] == wanted for line in lines[:first_whole])
    assert all(line[1] == "True" for line in lines[first_whole:])
    if (out / "config.json").exists():
        assert difference(loaded(out), fxfuse.apply(model, PLAN, inner="eager")) < 1e-8
    fxfuse.export(tiny("llama"), PLAN, out, "nemotron-nas", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _written() -> int:
    """How many tensors the export of this file's model has: 5 attentions and FFNs, embedding, norm and head."""
    return 5 * 5 + 5 * 4 + 3
