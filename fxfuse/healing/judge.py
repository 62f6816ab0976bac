"""Judge: how much of a change of weights brings the planned model nearer to the original, on every kind of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxfuse.healing.text import Kind
from fxfuse.measure.answers import Answers
from fxfuse.measure.evaluation import evaluate
from fxfuse.measure.planned import Planned
from fxfuse.plan import Plan

SHARES = (1.0, 0.75, 0.5, 0.25)
"""How much of the change is tried, the most first: the whole may be too much for text of other kinds."""


TOKENS = 2048
"""How many of each kind of text judge: the same ones before and after, so that few tell two models apart."""

KEPT = 2 << 30
"""Bytes of the original's logits that are kept, at most."""


@dataclass(frozen=True)
class Divergence:
    """KL(original || planned) on text held out, nats per token, before healing and after."""

    before: float
    after: float


@dataclass(frozen=True)
class Verdict:
    """What became of the change that one method made.

    Attributes:
        method: the method.
        share: how much of its change was kept; 0 if the weights are as they were before it.
        kl: before the method and after it, by kind of text.
        changed: whether there was a change to judge; there is none if no step got better, or there was no time.
    """

    method: str
    share: float
    kl: Mapping[str, Divergence]
    changed: bool = True

    def __str__(self) -> str:
        if self.share:
            return f"{self.method}: {self.share:.0%} of its change was kept"
        if not self.changed:
            return f"{self.method}: it changed nothing, for lack of time or of anything better"
        return f"{self.method}: nothing of it was kept: it brings not every kind of text nearer to the original"


@dataclass(frozen=True)
class Change:
    """New weights of a model in place of those that it had before.

    Attributes:
        model: has the parameters.
        before: values that stood for the model's own already, by name.
        after: the new ones.
        anew: those of ``after`` that have nothing to do with the model's own values.
    """

    model: nn.Module
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    anew: frozenset[str] = field(default_factory=frozenset)

    def share(self, share: float) -> dict[str, Tensor]:
        """What stands for the model's own values with so much of the change; with none, they are as before."""
        made = dict(self.before)
        for name, new in self.after.items() if share else ():
            parameter = self.model.get_parameter(name).detach()
            new = new.to(parameter.device)
            fresh = torch.zeros_like(parameter) if name in self.anew else parameter
            start = self.before.get(name, fresh).to(parameter.device)
            made[name] = new if share == 1 else torch.lerp(start, new, share)
        return made


class Judge:
    """Compares a planned model with the original on the first 2,048 tokens of each kind of text that was held out.

    Args:
        original: the model without the plan.
        planned: the same, or a copy that is to run under the plan.
        plan: the plan.
        text: the kinds of text.
        progress: show on stderr how far it is.
    """

    def __init__(
        self, original: nn.Module, planned: nn.Module, plan: Plan, text: Sequence[Kind], progress: bool
    ) -> None:
        self._original, self._text, self._progress = Answers(original, KEPT), text, progress
        self._planned = Planned(planned)
        self._planned.plan = plan
        self._known: dict[str, float] | None = None  # KL with the weights that were kept last

    def __call__(self, method: str, change: Change) -> tuple[Verdict, dict[str, Tensor]]:
        """How much of what ``method`` changed is kept, and the weights with that: the share that leaves least KL.

        A share counts only if it lessens the KL of every kind of text.
        """
        before = self._measured(change.share(0.0)) if self._known is None else self._known
        best, after, least = 0.0, before, 1.0
        for share in SHARES if change.after else ():
            now = self._measured(change.share(share))
            left = self._left(now, before)
            if left < least and all(now[name] < before[name] for name in now):
                best, after, least = share, now, left
            elif best:
                break  # less of the change is less good
        self._known = after
        kl = {name: Divergence(before[name], after[name]) for name in before}
        return Verdict(method, best, kl, bool(change.after)), change.share(best)

    def _measured(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        self._planned.weights = weights
        made: dict[str, float] = {}
        for kind in self._text:
            kl = evaluate(
                self._planned, kind.held, reference=self._original, max_tokens=TOKENS, progress=self._progress
            ).kl
            assert kl is not None  # there is a reference
            made[kind.name] = kl
        return made

    def _left(self, kl: Mapping[str, float], before: Mapping[str, float]) -> float:
        """The geometric mean over kinds of text of how much of the divergence is left; each counts by its weight."""
        tiny = 1e-12
        logs = [kind.weight * math.log((kl[kind.name] + tiny) / (before[kind.name] + tiny)) for kind in self._text]
        return math.exp(sum(logs) / sum(kind.weight for kind in self._text))
