"""What tests of kernels share that are, or may be, interpreted on a CPU: the interpreter, and poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.kernels.poison import poisoned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from tests.kernels.interpreted import faithful

    faithful.install()


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield
