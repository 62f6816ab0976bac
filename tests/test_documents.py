"""The documents are true of the sources: paths exist, rooms and environment variables are all there."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ENVIRONMENT = (ROOT / "docs" / "environment.md").read_text()

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@every_page
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]

    assert [link for link in links if not (page.parent / link).exists()] == []


@every_page
def test_every_path_that_is_named_exists(page: Path) -> None:
    named = re.findall(r"`((?:fxfuse|tests|benchmarks|docs)/[\w./]+)`", page.read_text())
    taught = {
        "fxfuse/passes/fold_scale.py",
        "tests/passes/test_fold_scale.py",
    }  # the reader writes them

    assert [path for path in named if path not in taught and not (ROOT / path).exists()] == []


def test_every_room_has_a_line_in_the_design() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    rooms = {room for layer in contract["layers"] for room in layer.split(" | ")}
    table = (ROOT / "docs" / "design.md").read_text().partition("## The rooms")[2].partition("\n## ")[0]
    first = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)

    assert {room for cell in first for room in re.findall(r"`(\w+)`", cell)} == rooms


def variables(tree: ast.AST) -> Iterator[str]:
    """The environment variables that a source reads; of one that it does not name, the expression."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=owner, attr=attr), args=[key, *_]) if attr != "copy":
                found = attr == "getenv" or _is_environment(owner)
            case ast.Call(func=ast.Name(id="getenv"), args=[key, *_]):
                found = True
            case ast.Subscript(value=owner, slice=key) | ast.Compare(left=key, comparators=[owner]):
                found = _is_environment(owner)
            case _:
                continue
        if found:
            yield key.value if isinstance(key, ast.Constant) else ast.unparse(key)


def _is_environment(node: ast.AST) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
        isinstance(node, ast.Name) and node.id == "environ"
    )


def test_every_environment_variable_that_is_read_is_on_the_page_and_no_other() -> None:
    sources = [file for folder in ("fxfuse", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    read = {name for file in sources for name in variables(ast.parse(file.read_text()))}
    table = ENVIRONMENT.partition("## Read by fxfuse")[2].partition("\n## ")[0]

    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == read


@pytest.mark.parametrize(
    "source",
    [
        "os.environ['X']",
        "os.environ.get('X', 1)",
        "environ.get('X')",
        "os.getenv('X')",
        "getenv('X')",
        "'X' in environ",
    ],
)
def test_a_variable_is_seen_however_it_is_read(source: str) -> None:
    assert list(variables(ast.parse(source))) == ["X"]


def test_every_argument_of_the_makefile_is_on_the_page() -> None:
    arguments = re.findall(r"^(\w+)\s*\?=", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)

    assert arguments
    assert all(f"`{name}`" in ENVIRONMENT for name in arguments)
