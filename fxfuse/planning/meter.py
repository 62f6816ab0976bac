"""What a plan costs: how far the planned model's next-token distribution is from the original's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from fxfuse._torch.compiled import original
from fxfuse._torch.dynamo import originals_forbidden
from fxfuse.data.batches import Batch, Model
from fxfuse.measure.evaluation import evaluate
from fxfuse.measure.planned import Planned, compiled
from fxfuse.model.force import uncompiled
from fxfuse.plan import Plan


class Meter:
    """``meter(plan)``: KL(original || planned) over the batches, nats per token; each plan is measured once.

    Args:
        model: the original, compiled or not. It stays as it is, and so do the graphs that were compiled of it.
        batches: see :func:`fxfuse.evaluate`; the same ones in each measurement.
        max_tokens: how many predicted tokens :meth:`final` measures on; all, if None.
        search_tokens: how many all others do; ``max_tokens`` if None.
        progress: show on stderr how far each measurement is.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        max_tokens: int | None = None,
        search_tokens: int | None = None,
        progress: bool = False,
    ) -> None:
        self._model, self._batches, self._progress = original(model), Replay(batches), progress
        self._max_tokens, self._search_tokens = max_tokens, search_tokens or max_tokens
        self._planned = Planned(self._model)
        self._known: dict[Plan, float] = {}

    def __call__(self, plan: Plan) -> float:
        """The cost of ``plan``, its graphs run as they are. Of the empty plan 0 by definition: all else is exact.

        Raises:
            PlanError: the plan cannot be applied to the model.
            RecordError: the model cannot be evaluated on the batches.
        """
        if plan not in self._known:
            self._planned.plan = plan
            self._known[plan] = self._measure(self._planned, self._search_tokens) if plan else 0.0
        return self._known[plan]

    def final(self, plan: Plan) -> float:
        """The cost of ``plan`` on all tokens, the model compiled by the backend ``ffnfuse``: FFNs fused, dtype and all.

        Raises:
            PlanError, RecordError: as above.
        """
        if not plan:
            return 0.0
        with compiled(self._model, plan) as model:
            return self._measure(model, self._max_tokens)

    def _measure(self, planned: Model, tokens: int | None) -> float:
        with originals_forbidden(), uncompiled(self._model):
            found = evaluate(planned, self._batches, reference=self._model, max_tokens=tokens, progress=self._progress)
        assert found.kl is not None  # there is a reference
        return found.kl


class Replay:
    """Batches that may be gone through many times, the same ones in the same order, and are read only as needed.

    A generator can be gone through once, a shuffling DataLoader gives others each time, and a stream never ends.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._rest = iter(batches)
        self._kept: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        yield from self._kept
        for batch in self._rest:
            self._kept.append(batch)
            yield batch
