"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fxfuse.errors import FxfuseError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path``; a reader sees the old file or the new one, never a part.

    A link stays a link, and what it leads to is written. What is there and is no file (a pipe, ``/dev/null``) is
    written into: a file moved into its place would end it.

    Raises:
        OSError: the folder is missing or cannot be written; a file that was there before is untouched.
    """
    if _is_special(path):
        with open(path, "wb") as special:
            special.write(content)
        return
    target = Path(os.path.realpath(path))
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Say now, and not in an hour, that :func:`write_atomically` cannot write to ``path``.

    Raises:
        FxfuseError: it is a folder, or its folder is missing or cannot be written.
    """
    if Path(path).is_dir():
        raise FxfuseError(f"{os.fspath(path)!r} is a folder: give the name of a file in it")
    if _is_special(path):
        return
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FxfuseError(f"there is no folder {str(target.parent)!r} to write {target.name} to")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise FxfuseError(f"cannot write {target.name} to {str(target.parent)!r}: {error.strerror}") from error


def _is_special(path: str | os.PathLike[str]) -> bool:
    found = Path(path)
    return found.exists() and not found.is_file()
