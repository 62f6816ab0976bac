"""Weights are written all or not at all, and so is the mark of their plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxfuse import Plan, PlanError
from fxfuse.healing.commit import commit
from fxfuse.model.healed import BUFFER, healed_for, mark_healed
from tests.models.language import EDITS, language
from tests.models.tiny import llama

PLAN = Plan(**EDITS)


class Poisoned(nn.Parameter):
    """Lets itself be written but once: the first time it is half way through, Ctrl-C."""

    def copy_(self, *args: Any, **kwargs: Any) -> Any:
        if not vars(self).get("raised"):
            self.raised = True
            with torch.no_grad():
                self[0] = 1e6
            raise KeyboardInterrupt
        return super().copy_(*args, **kwargs)


def test_an_interruption_in_the_middle_leaves_the_old_weights() -> None:
    model = language()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    down = model.get_submodule("layers.1.mlp.down")
    down.weight = Poisoned(down.weight.detach())  # type: ignore[assignment]
    new = {name: value + 1 for name, value in before.items()}
    assert list(new).index("layers.1.mlp.down.weight") > 0  # others are written before

    with pytest.raises(KeyboardInterrupt):
        commit(model, PLAN, new)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    commit(model, PLAN, new)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in new.items())
    assert healed_for(model) == PLAN


@pytest.mark.parametrize("make", [language, llama])
def test_what_cannot_be_marked_is_not_written(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    configs = [vars(module).get("config") for module in model.modules()]

    def interrupted(*args: Any) -> None:
        mark_healed(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fxfuse.healing.commit.mark_healed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            commit(model, PLAN, {name: value + 1 for name, value in before.items()})
    assert healed_for(model) is None and BUFFER not in model.state_dict()
    assert [vars(module).get("config") for module in model.modules()] == configs
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    commit(model, PLAN, before)
    with pytest.raises(PlanError, match="was healed for a plan"):
        commit(model, Plan(drop=["layers.0.attn"]), {name: value + 1 for name, value in before.items()})
    assert healed_for(model) == PLAN
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
