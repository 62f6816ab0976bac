"""Files of tensors are read as they were written, and damage shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fxfuse._common.sealed import seal, unseal

HEADER = {"names": ("a", "b"), "number": 0.1, "none": float("inf")}
TENSORS = {
    "bfloat16": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T,
    "one": torch.tensor(True),
    "empty": torch.empty(0, 3),
    "trained": torch.ones(2, requires_grad=True),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "sealed"
    made.write_bytes(seal("form", HEADER, TENSORS))
    return made


def test_what_was_written_is_read(path: Path) -> None:
    found = unseal(path, "form")

    assert found is not None
    assert found[0] == {"names": ["a", "b"], "number": 0.1, "none": float("inf")}
    assert found[1].keys() == TENSORS.keys()
    assert all(torch.equal(each, found[1][name]) for name, each in TENSORS.items())
    assert seal("form", *found) == path.read_bytes()


def test_another_form_is_none(path: Path) -> None:
    assert unseal(path, "another") is None


@pytest.mark.parametrize("what", ["a number", "a name", "a shape", "the header"])
def test_what_was_not_written_shows(path: Path, what: str) -> None:
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["form"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    if what == "a number":
        tensors["bfloat16"][2, 1] += 1
    elif what == "a name":
        tensors["two"] = tensors.pop("one")
    elif what == "a shape":
        tensors["trained"] = tensors["trained"][None]
    else:
        header["number"] = 0.2
    save_file(tensors, path, {"form": json.dumps(header)})

    with pytest.raises(ValueError, match="not what was written"):
        unseal(path, "form")


def test_a_file_from_before_there_was_a_digest_is_read(tmp_path: Path) -> None:
    save_file({"one": torch.ones(1)}, tmp_path / "old", {"form": '{"a": 1}'})

    found = unseal(tmp_path / "old", "form")
    assert found is not None and found[0] == {"a": 1}


@pytest.mark.parametrize("header", ["[]", "null", "{", "[" * 100_000])
def test_a_header_that_is_none_is_an_error(tmp_path: Path, header: str) -> None:
    save_file({"one": torch.ones(1)}, tmp_path / "old", {"form": header})

    with pytest.raises(ValueError, match=r"header|Expecting"):
        unseal(tmp_path / "old", "form")
