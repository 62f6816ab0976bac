"""What is written where something else stands already: a link, a pipe, a device, a folder."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fxfuse._common.files import check_writable, write_atomically
from fxfuse.errors import FxfuseError


def test_a_link_stays_a_link_and_its_target_is_written(tmp_path: Path) -> None:
    folder, link = tmp_path / "elsewhere", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder / "target")

    for content in (b"one", b"two"):
        write_atomically(link, content)

        assert link.is_symlink()
        assert (folder / "target").read_bytes() == content
    assert [each.name for each in folder.iterdir()] == ["target"]


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()

    check_writable(pipe)
    write_atomically(pipe, b"content")

    reader.join(timeout=10)
    assert read == [b"content"]
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("path", "message"), [(".", "is a folder"), ("nowhere/x", "no folder"), ("/proc/x", "cannot write x")]
)
def test_what_cannot_be_written_is_said_before(path: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FxfuseError, match=message):
        check_writable(tmp_path / path)


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "x")

    assert list(tmp_path.iterdir()) == []
