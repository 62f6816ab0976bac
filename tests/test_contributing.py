"""The pass that CONTRIBUTING.md teaches is real: its code runs, and its tests hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
CODE = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE))
TESTS = re.findall(r"^def (test_\w+)", CODE, flags=re.MULTILINE)


def test_the_page_teaches_by_tests() -> None:
    assert len(TESTS) >= 2


@pytest.mark.parametrize("name", TESTS)
def test_the_example_does_what_it_says(name: str) -> None:
    # The second block's `from __future__` would come too late in one file; the first block's serves both.
    namespace: dict[str, object] = {"__name__": "contributing"}
    exec(compile(CODE, str(PAGE), "exec"), namespace)
    test = namespace[name]
    assert callable(test)
    test()
