"""A minute of the soak, and that it notices what it is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.soak import lives, run
from tests.soak.lives import Life, MismatchError

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_minute_of_lives_is_as_it_should_be() -> None:
    command = [sys.executable, "-m", "tests.soak", "--minutes", "1", "--jobs", "1", "--seed", "100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " 0 wrong" in done.stdout.splitlines()[-1]


def test_a_call_that_missed_an_update_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(1)
    lives.call(life)
    stale = life.reference()
    life.model.model.layers[0].mlp.up_proj.weight.data *= 2
    lives.call(life)
    monkeypatch.setattr(life, "reference", lambda: stale)

    with pytest.raises(MismatchError):
        lives.call(life)


def test_a_mixture_of_old_and_new_weights_is_noticed() -> None:
    life = Life(1)
    old, new = torch.ones(2, 3), torch.full((2, 3), 2.0)

    life.check(old, old, new)
    life.check(new, old, new)
    with pytest.raises(MismatchError):
        life.check(torch.stack([old[0], new[0]]), old, new)


def test_what_a_life_leaves_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Life] = []

    def lived(seed: int) -> Life:
        kept.append(Life(seed))
        return kept[-1]

    monkeypatch.setattr(lives, "lived", lived)

    assert "left" in run.one(1).wrong
    assert "LlamaForCausalLM" in run.one(1).wrong
