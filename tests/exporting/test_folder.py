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
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


def test_what_was_killed_between_two_names_is_put_back(tmp_path: Path) -> None:
    out, old = tmp_path / "out", tmp_path / ".out.old"
    old.mkdir()
    (old / "mine.txt").write_text("mine")

    with pytest.raises(ExportError, match="not empty"):
        fxfuse.export(tiny("llama"), PLAN, out, "nemotron-nas", check=False)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]

    fxfuse.export(tiny("llama"), PLAN, out, "nemotron-nas", overwrite=True, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "mine.txt").exists()


@pytest.mark.parametrize("form", ["nemotron-nas", "transformers"])
def test_a_tokenizer_loads_without_trust_in_the_folders_code(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"[UNK]": 0, "hello": 1, "there": 2}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    given = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")

    folder = fxfuse.export(tiny("llama"), PLAN, tmp_path / "out", form, given, check=False)

    # With no word on trust transformers would ask on the terminal, as the model's config is code, and go on either way.
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    made = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert made.encode("hello there you") == [1, 2, 0]


_KILLED = """
import json, os, random, sys
from pathlib import Path
import fxfuse
from fxfuse.exporting import tensors
from tests.exporting.families import tiny
from tests.exporting.test_folder import PLAN

folder, form, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model = tiny("llama")
STEPS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree", "shutil.copyfile")


def export(last, where):
    \"\"\"Export in a process that is killed before the step ``last`` that changes a file; says how many it took.\"\"\"
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        told = os.read(reading, 100)
        os.close(reading)
        _, status = os.waitpid(child, 0)
        return int(told or -1), status
    taken = 0

    def step(*_):
        nonlocal taken
        if taken == last:
            os.kill(os.getpid(), 9)
        taken += 1

    def audit(event, args):
        if event in STEPS and str(args[0]).startswith(str(where.parent)):
            step()

    write = tensors._write_one
    tensors._write_one = lambda file, weight: (file.flush(), step(), write(file, weight))
    sys.addaudithook(audit)
    fxfuse.export(model, PLAN, where, form, overwrite=True, check=False)
    os.write(writing, str(taken).encode())
    os._exit(0)


whole = folder.parent / "whole"
if folder.exists():
    whole.mkdir()
    (whole / "there").touch()
steps, status = export(-1, whole)
assert status == 0
for moment in random.Random(seed).sample(range(steps), 5):
    _, status = export(moment, folder)
    there = folder.exists(), folder.with_name(f".{folder.name}.old").exists()
    if there[0]:
        os.system(f"cp -r {folder} {folder.parent}/after-{moment}")
    print(json.dumps([status, *there]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nemotron-nas", "transformers"])
@pytest.mark.parametrize("there_before", [False, True], ids=["new", "replaced"])
def test_killed_at_random_moments_it_leaves_no_folder_that_loads_wrong(
    there_before: bool, form: str, tmp_path: Path
) -> None:
    """Five of twenty kills. The folder is absent, or all of what was there before, or all of what was written."""
    out, model, before = tmp_path / "out", tiny("llama"), fxfuse.Plan(drop=["model.layers.3.self_attn"])
    if there_before:
        fxfuse.export(model, before, out, form, check=False)
    seed = 2 * ["nemotron-nas", "transformers"].index(form) + there_before

    told = subprocess.run(
        [sys.executable, "-c", _KILLED, str(out), form, str(seed)], capture_output=True, text=True, check=True
    )

    killed = [json.loads(line) for line in told.stdout.splitlines() if line.startswith("[")]
    assert [status for status, *_ in killed] == [9] * 5
    assert not there_before or all(any(there) for _, *there in killed)
    wanted = [fxfuse.apply(tiny("llama"), plan, inner="eager") for plan in (before, PLAN)]
    for folder in tmp_path.glob("after-*"):
        assert min(difference(loaded(folder), one) for one in wanted) < 1e-8
    fxfuse.export(tiny("llama"), PLAN, out, form, overwrite=True)
    assert not list(tmp_path.glob(".*"))
    assert difference(loaded(out), wanted[1]) < 1e-8
