"""Hooks stand in the order in which they run, whoever counts them."""

from __future__ import annotations

import torch
from torch import nn

from fxfuse._torch.modules import pre_hooks, put_first


def test_a_hook_that_was_put_first_is_the_first_in_every_order() -> None:
    module, calls = nn.Linear(2, 2), list[str]()
    module.register_forward_pre_hook(lambda module, args: calls.append("the user's"))
    handle = module.register_forward_pre_hook(lambda module, args: calls.append("the user's second"))
    put_first(module, lambda module, args: calls.append("ours"))

    module(torch.zeros(1, 2))
    assert calls == ["ours", "the user's", "the user's second"]
    assert list(dict.keys(pre_hooks(module))) == list(pre_hooks(module))  # type: ignore[arg-type]

    handle.remove()
    assert len(pre_hooks(module)) == 2
