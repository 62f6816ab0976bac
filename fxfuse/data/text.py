"""Text as batches of tokens, and texts that are always at hand: what comes with Python, and with torch."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from fxfuse.data.loading import Loaded
from fxfuse.errors import LoadError

_LONG = 200
"""Characters of what is more than a word or two."""

Use: TypeAlias = Literal["record", "plan", "hold out"]

_USES: dict[Use, tuple[int, ...]] = {"record": (0, 3), "plan": (1,), "hold out": (2,)}
"""Which of every four topics of Python's documentation serve which purpose; no two purposes share one."""


def python_documentation(use: Use) -> str:
    """Python's own reference documentation, about 90,000 tokens of English and code, in three parts without overlap."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    chosen: list[str] = []
    for index, name in enumerate(sorted(topics)):
        fresh = [paragraph for paragraph in topics[name].strip().split("\n\n") if paragraph.strip() not in seen]
        seen.update(paragraph.strip() for paragraph in fresh)  # topics quote each other at length
        if index % 4 in _USES[use]:
            chosen += fresh
    return "\n\n".join(chosen)


def docstrings() -> str:
    """The longer docstrings of the standard library, each module's after the other: about 170,000 tokens."""
    kept: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                kept += [text] if len(text := ast.get_docstring(node) or "") > _LONG else []
    return "\n\n".join(kept)


def licences() -> str:
    """The paragraphs of the licences that come with torch, each once: 13,000 tokens of another kind of English."""
    kept: dict[str, str] = {}
    files = (file for file in distribution("torch").files or () if "licenses" in file.parts)
    for file in sorted(files):
        for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
            kept.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(paragraph for words, paragraph in kept.items() if len(words) > _LONG)


def read_text(path: Path) -> str:
    """The text in a file, UTF-8.

    Raises:
        LoadError: it is not there, or not text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"cannot read the text {str(path)!r}: {error}") from error
    if not text.strip():
        raise LoadError(f"the text {str(path)!r} is empty")
    return text


def batches_of(loaded: Loaded, text: str, length: int, tokens: int, batch: int = 1) -> Iterator[dict[str, object]]:
    """``text`` as batches ``{"input_ids": [batch, length], "use_cache": False, ...}`` of whole sequences.

    Args:
        loaded: a language model with its tokenizer; other arguments of its example call are passed on.
        text: cut into sequences, each once, from the start.
        length: tokens in a sequence, at least 2.
        tokens: stop after the batch that reaches this number.
        batch: sequences in a batch; the last one may be smaller.

    Raises:
        LoadError: there is no tokenizer, the model is not called with tokens, or the text is shorter than a sequence.
    """
    if loaded.tokenizer is None or not loaded.reads_tokens:
        raise LoadError("this model came without a tokenizer: use the Python functions, with batches of your own")
    if length < 2 or tokens < 1 or batch < 1:
        raise LoadError(f"a length of at least 2, and tokens and batch of at least 1, not {length}, {tokens}, {batch}")
    ids = loaded.tokenizer.encode(text)
    if len(ids) < length:
        raise LoadError(
            f"the text has {len(ids)} tokens, less than one sequence of {length}: give more, or a shorter length"
        )
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    wanted = min(len(rows), -(-tokens // length))
    for part in torch.split(rows[:wanted], batch):
        yield {**loaded.kwargs, "input_ids": part}
