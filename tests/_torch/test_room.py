"""Private APIs of torch are in `fxfuse/_torch` alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fxfuse

PACKAGE = Path(fxfuse.__file__).parent

FOREIGN = {
    "bench/engines/llama_cpp_worker.py": {"_cffi_bindings"},
    "exporting/transformers.py": {"_name_or_path"},
    "kernels/compile.py": {"_active"},
    "healing/trainer.py": {"_prepare_inputs"},
    "healing/training.py": {"_n_gpu"},
    "measure/tasks/harness.py": {"_stderr"},
}
"""Private names that are not torch's: llama-cpp-py-sync keeps llama.cpp's own functions in such a module, Triton has no
public way to ask for the driver that is set, nor Hugging Face's Trainer for how it moves batches and on how many GPUs
of a process it splits them. Its configs are written with the path that they were read from. The last is of lm_eval's
keys."""

PUBLIC = ("torch.ops.aten", "ops.aten", "sys")
"""What torch does not hide: names of ops, which graphs hold, and Python's own ``sys._getframe``."""


def private(name: str) -> bool:
    return re.fullmatch(r"_(?!fxfuse)[A-Za-z]\w*", name) is not None


def own_names(tree: ast.Module) -> set[str]:
    """The names that a file gives to things itself."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    of_self = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return own | {node.attr for node in of_self if isinstance(node.value, ast.Name) and node.value.id == "self"}


def uses(source: str) -> Iterator[str]:
    """The private names of others in the text of a file: imported, read or written as attributes, or as strings.

    Names of aten's ops are no API that is called: graphs hold them.
    """
    tree = ast.parse(source)
    own = own_names(tree)
    in_text = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("fxfuse"):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            yield from (name for name in names if node.module != "__future__" and private(name))
        elif isinstance(node, ast.Import):
            yield from (name for alias in node.names for name in alias.name.split(".") if private(name))
        elif isinstance(node, ast.Attribute) and private(node.attr):
            yield from {node.attr} - (own if ast.unparse(node.value) not in PUBLIC else {node.attr})
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and private(node.value):
            in_a_graph = hasattr(torch.ops.aten, node.value)
            yield from () if in_a_graph or id(node) in in_text else {node.value} - own


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "_torch"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_apis_of_torch_stay_in_their_room(path: Path) -> None:
    found = set(uses(path.read_text())) - FOREIGN.get(path.relative_to(PACKAGE).as_posix(), set())
    assert not found, (
        f"{', '.join(sorted(found))}: private; give it a function in fxfuse/_torch that says why it needs it"
    )


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch._dynamo", ["_dynamo"]),
        ("from torch._inductor.compile_fx import compile_fx", ["_inductor"]),
        (
            "from torch.utils._python_dispatch import _disable_current_modes",
            ["_python_dispatch", "_disable_current_modes"],
        ),
        ("mode = torch._guards.detect_fake_mode(inputs)", ["_guards"]),
        ("source = node._dynamo_source", ["_dynamo_source"]),
        ("source = getattr(node, '_dynamo_source', None)", ["_dynamo_source"]),
        ("vars(model)['_modules'] = {}", ["_modules"]),
        ("self._model._initialize()", ["_model", "_initialize"]),
        ("class A:\n    def __init__(self): self._x = other._x", []),
        ("node.target is torch.ops.aten._to_copy.default", []),
        ("name = f'{target}_inlined'", []),
        ("from fxfuse._torch.ops import schema", []),
    ],
)
def test_a_private_name_is_one_that_the_file_does_not_give_itself(source: str, found: list[str]) -> None:
    assert sorted(uses(source)) == sorted(found)
