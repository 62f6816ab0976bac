from __future__ import annotations

import pytest

from tests.mutations import Mutation, mutations


def test_each_has_its_text_where_it_is_to_be() -> None:
    made = mutations()

    assert len({each.name for each in made}) == len(made) > 90


def test_one_whose_text_is_gone_is_named() -> None:
    with pytest.raises(SystemExit, match="a fault: fxfuse/errors.py no longer has its text once"):
        Mutation("a fault", "fxfuse/errors.py", "no such text", "", ()).check()
