"""A model as a plan has it, beside the model itself: for trying plans, many of them or one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfuse._torch.apart import APART, forget, twin
from fxfuse.backend.frontend import Captured, compiled_apart, take
from fxfuse.backend.naming import elsewhere
from fxfuse.data.batches import Model, on_device_of
from fxfuse.model.force import uncompiled
from fxfuse.passes.linear import OwnMap
from fxfuse.passes.pipeline import edit
from fxfuse.plan import Plan


class Planned:
    """``model`` as ``plan`` has it, and with some ``weights`` in place of its own.

    Both may be set anew between calls: a plan for the price of rewriting the graphs, weights for none.

    Args:
        model: it stays as it is.
        maps: by name, for attentions that a plan makes linear and whose output projection cannot be the map.

    The model is traced once. A torch.compile for each plan would trace it each time, and Dynamo keeps a part of what it
    traced for as long as the model lives. Nothing is fused, which is exact.
    """

    def __init__(self, model: nn.Module, maps: Mapping[str, OwnMap] | None = None) -> None:
        self.plan = Plan()
        self.weights: Mapping[str, Tensor] = {}  # that stand for the model's own, by name
        self._model, self._maps = model, maps
        self._compiled = compiled_apart(model, self._follow, dynamic=None)

    def __call__(self, **batch: object) -> object:
        """What the planned model returns, without gradients.

        Raises:
            PlanError: the plan does not fit the model.
        """
        with torch.no_grad(), uncompiled(self._model):
            return self._compiled(**on_device_of(self._model, batch))

    def _follow(self, gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        captured = take(gm, inputs, self._model)
        names = [captured.names.get(node, "") for node in captured.gm.graph.find_nodes(op="placeholder")]
        rewritten: tuple[Plan, fx.GraphModule] | None = None

        def run(*inputs: object) -> object:
            nonlocal rewritten
            if rewritten is None or rewritten[0] != self.plan:
                rewritten = self.plan, self._rewritten(captured.copy())
            given = zip(names, inputs, strict=True)
            return rewritten[1](*(self.weights.get(name, value) for name, value in given))

        return run

    def _rewritten(self, captured: Captured) -> fx.GraphModule:
        gm, names = captured.gm, captured.names
        gone = elsewhere(self._model, names, self.plan)
        edit(gm, self.plan, names=names, strict=True, elsewhere=gone, maps=self._maps)
        return gm


@contextmanager
def compiled(model: nn.Module, plan: Plan) -> Iterator[Model]:
    """``torch.compile(model, backend="ffnfuse")`` under ``plan``, its fused graphs run by eager PyTorch.

    It has no effect on other compilations of the model, nor have they on it, and nothing of it stays afterwards.
    """
    handle = twin(model)
    options: Any = {"plan": plan, "inner": "eager", "strict": True}  # torch types the values of inductor's options
    try:
        yield torch.compile(handle, backend="ffnfuse", options=options, **APART)
    finally:
        forget(handle)
