"""A folder that is whole or not there: written beside its place, then moved into it; and what lies beside weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import nn

from fxfuse.errors import ExportError
from fxfuse.measure.recording import model_digest
from fxfuse.plan import Plan

PROVENANCE = "fxfuse.json"
"""What an export was made from: the digests of the model and of the plan, the format, fxfuse's version."""


@runtime_checkable
class Saveable(Protocol):
    """A Hugging Face tokenizer, or a generation config."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> object:
        """Write its files into ``folder``."""


@contextmanager
def new_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A folder to write to that takes the name ``folder`` when all is written, and is gone if anything fails.

    What is killed meanwhile leaves ``folder`` as it was, and ``.NAME.partial`` beside it, which the next export takes
    away. With ``overwrite`` the old folder is moved aside, to ``.NAME.old``, just before the new one takes its place;
    what is killed between the two leaves no ``folder``, and the next export moves the old one back before it begins.

    Raises:
        ExportError: there is something of that name already, or nothing can be written there; or the disk is full.
    """
    target = Path(os.path.realpath(folder))
    partial, old = (target.with_name(f".{target.name}.{what}") for what in ("partial", "old"))
    if old.is_dir() and not target.exists():
        old.rename(target)
    _check(target, overwrite)
    try:
        for left in (partial, old):
            if left.exists():
                shutil.rmtree(left)
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except OSError as error:
        raise ExportError(_words(error, target)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _check(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ExportError(f"{str(target)!r} is a file: give the name of a folder")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise ExportError(f"{str(target)!r} is there already and not empty: give another folder, or overwrite=True")
    if not target.parent.is_dir():
        raise ExportError(f"there is no folder {str(target.parent)!r} to make {target.name!r} in")


def _words(error: OSError, target: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: nothing was left of {str(target)!r}; make room and export again"
    return f"cannot write {str(target)!r}: {error.strerror or error}"


def write_companions(
    folder: Path, model: nn.Module, plan: Plan, form: str, tokenizer: object = None, notes: Mapping[str, object] = {}
) -> None:
    """Write what lies beside the weights: tokenizer with chat template, generation config, plan, and provenance.

    Args:
        folder: where to.
        model: the model that the plan was applied to.
        plan: the plan.
        form: the name of the format.
        tokenizer: a Hugging Face tokenizer, or None.
        notes: what else to keep in the provenance.

    Raises:
        ExportError: the tokenizer has no ``save_pretrained``.
    """
    if tokenizer is not None:
        if not isinstance(tokenizer, Saveable):
            raise ExportError(f"a {type(tokenizer).__name__} has no save_pretrained: give a Hugging Face tokenizer")
        tokenizer.save_pretrained(folder)
    if isinstance(generation := getattr(model, "generation_config", None), Saveable):
        generation.save_pretrained(folder)
    plan.save(folder / "plan.json")
    made_from = {
        "fxfuse": metadata.version("fxfuse"),
        "format": form,
        "model": model_digest(model),
        "class": type(model).__name__,
        "plan": plan.digest,
        **notes,
    }
    write_json(folder / PROVENANCE, made_from)


def format_of(folder: Path) -> str | None:
    """The format of an export, or None if ``folder`` is none.

    Raises:
        ExportError: what says so is damaged.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        return None
    try:
        held: object = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{str(path)!r} cannot be read ({error}): export again") from error
    form = held.get("format") if isinstance(held, dict) else None
    if not isinstance(form, str):
        raise ExportError(f"{str(path)!r} does not say which format the export has: export again")
    return form


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write ``content`` for people to read."""
    path.write_text(json.dumps(content, indent=2) + "\n")
