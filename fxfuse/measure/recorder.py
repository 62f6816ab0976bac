"""Record: which branches depend on which, measured by really dropping each, on the user's own text.

Source: the dependency matrix of FFN Fusion (arXiv 2503.18908, section 4); scores of LLM-Drop (arXiv 2406.15786) and of
Puzzle (arXiv 2411.19146). The model is traced as torch.compile traces it, and each of its graphs instrumented
(:mod:`fxfuse.measure.instrument`); nothing here knows a model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxfuse._common.bounds import check_count
from fxfuse._common.progress import bar
from fxfuse._torch.compiled import original
from fxfuse._torch.dynamo import originals_forbidden
from fxfuse.backend.frontend import compiled_apart, take
from fxfuse.backend.naming import elsewhere
from fxfuse.data.batches import blaming, check_batch, eval_mode, fresh, logits_of, on_device_of
from fxfuse.errors import NotFiniteError, OptionError, RecordError
from fxfuse.measure.divergence import Divergence, cosine_distance, rows
from fxfuse.measure.instrument import Instrumented
from fxfuse.measure.measurements import Measurements
from fxfuse.measure.recording import Recording, model_digest
from fxfuse.measure.resume import State, digest_batch
from fxfuse.model.force import uncompiled
from fxfuse.model.spread import spread_weights
from fxfuse.passes.pipeline import edit
from fxfuse.plan import Plan


def record(
    model: nn.Module,
    batches: Iterable[Mapping[str, object]],
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    max_tokens: int | None = None,
    max_group: int = 4,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Recording:
    """Measure what depends on what in ``model``.

    Each batch is run once, and then, for each branch, that part of the model again which comes after the branch, with
    the branch dropped: m branches cost about m / 2 runs. The model runs in eval mode, without gradients, and is left
    as it was.

    Args:
        model: any module that torch.compile traces to one graph; of a compiled one, the module itself is recorded.
        batches: keyword arguments of the model's calls, such as ``{"input_ids": ...}``; a DataLoader serves. Positions
            where ``attention_mask`` is 0 do not count.
        plan: what the recorded model follows, or the path of it; measure with the attentions dropped that you are going
            to drop.
        max_tokens: stop after the batch that reaches this number.
        max_group: the longest run of consecutive FFNs that is measured as a group; below 2, none is.
        resume: a file that keeps the state after each batch; where it exists, the batches that it has seen are passed
            over, if they are the same. An interrupted recording ends with the same numbers as one that was not. Remove
            it when done.
        progress: show on stderr how far it is, as a bar or, without a terminal, in lines.

    Raises:
        CaptureError: the model cannot be traced to one graph, or a part of it cannot be run twice.
        RecordError: no batch; a batch that the model rejects; NaN in a branch; a state of something else.
        PlanError: the plan cannot be read, or does not fit.
        OptionError: an option out of range.
        FxfuseError: ``resume`` cannot be written.
    """
    check_count("max_tokens", max_tokens)
    recorder = Recorder(model, Plan.load(plan) if isinstance(plan, str | os.PathLike) else plan, max_group)
    state = State(resume, recorder.digest, recorder.settings) if resume is not None else None
    if state is not None:
        recorder.measured = state.load(max_tokens)
    seen = 0
    with eval_mode(recorder.model), bar("recording", "tokens", max_tokens, progress) as advance:
        for number, batch in enumerate(batches):
            passed_over = state is not None and number < recorder.batches
            if not passed_over and max_tokens is not None and recorder.tokens >= max_tokens:
                break
            check_batch(number, batch, tokens=False)
            seen += 1
            if state is not None and passed_over:
                state.check(number, batch)
                continue
            before = recorder.tokens
            recorder(number, fresh(batch))
            if state is not None and recorder.measured is not None:
                state.save(recorder.measured, digest_batch(batch))
            advance(recorder.tokens - before)
    if state is not None:
        state.check_all(seen)
    return recorder.result()


class Recorder:
    """Runs a model and measures its branches; ``result()`` is what it has seen so far.

    Attributes:
        measured: what was measured so far; None until the model has been called.
    """

    def __init__(self, model: nn.Module, plan: Plan | None, max_group: int) -> None:
        if max_group < 0:
            raise OptionError(f"max_group must not be negative, not {max_group}")
        if not isinstance(plan, Plan | None):
            raise OptionError(f"plan is a fxfuse.Plan or the path of one, not {plan!r}")
        if spread := spread_weights(model):
            raise RecordError(f"{spread}: record it in one process, before it is sharded; the plan serves both")
        self.model, self.plan, self.max_group = original(model), plan or Plan(), max_group
        self.digest = model_digest(self.model)
        plain = None if self.plan.narrow else {"narrow"}  # as states were written before there was any
        self.settings = {"plan": self.plan.model_dump_json(exclude=plain), "max_group": str(max_group)}
        self.measured: Measurements | None = None
        self._called: list[Instrumented] = []
        self._compiled = self._traced()

    @property
    def tokens(self) -> int:
        """Counted so far."""
        return 0 if self.measured is None else self.measured.tokens

    @property
    def batches(self) -> int:
        """Measured so far."""
        return 0 if self.measured is None else self.measured.batches

    def _instrument(self, gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        captured = take(gm, inputs, self.model)
        names = captured.names
        edit(captured.gm, self.plan, names=names, strict=True, elsewhere=elsewhere(self.model, names, self.plan))
        made = Instrumented(captured.gm, names, self.max_group)
        if not made.places:
            return gm.forward

        def run(*inputs: object) -> object:
            self._called.append(made)
            return made(*inputs)

        return run

    def __call__(self, number: int, batch: Mapping[str, object]) -> object:
        """Call the model with ``batch``, the ``number``-th, and measure; what the model returned."""
        with blaming(number, batch):
            output = self.run(batch)
        self.measure(number, batch, output)
        return output

    def run(self, batch: Mapping[str, object]) -> object:
        """Call the model with ``batch``: what it returns, or raises."""
        self._called.clear()
        try:
            with torch.no_grad(), uncompiled(self.model), originals_forbidden():
                return self._compiled(**on_device_of(self.model, batch))
        except Exception:
            self._compiled = self._traced()  # Dynamo never again looks at a frame that raised while it was traced
            raise

    def _traced(self) -> Callable[..., object]:
        return compiled_apart(self.model, self._instrument, dynamic=None)

    def measure(self, number: int, batch: Mapping[str, object], output: object) -> None:
        """Measure the branches in the call just made.

        Raises:
            NotFiniteError: NaN; what was measured until then is of no use any more.
            RecordError: this call cannot be measured; it is as if it had not been.
        """
        if len(self._called) != 1:
            raise RecordError(_no_single_graph(len(self._called)))
        (graph,) = self._called
        measured = self._meet(graph)
        with torch.no_grad():
            self._measure(measured, graph, number, batch, output)
        graph.forget()
        measured.batches += 1

    def _meet(self, graph: Instrumented) -> Measurements:
        places = tuple(place.record() for place in graph.places)
        if self.measured is None:
            self.measured = Measurements.of(places, graph.windows)
        if [place.name for place in places] != [place.name for place in self.measured.places]:
            raise RecordError("the model has other branches in this batch than in the first: record one kind of call")
        return self.measured

    def _measure(
        self, measured: Measurements, graph: Instrumented, number: int, batch: Mapping[str, object], output: object
    ) -> None:
        mask = batch.get("attention_mask")
        counted = mask if isinstance(mask, Tensor) else None
        kl = Divergence(graph, logits_of(output), counted)
        m = len(graph.places)
        base = []
        for i, place in enumerate(measured.places):
            if not place.adds:
                what = f"the stream before {place.name}, its first branch (the embedding, or what the model is given)"
                self._checked(graph.before(i), what, number, counted)
            base.append(self._checked(graph.contribution(i), place.name, number, counted))
        if kl.known is not None:
            self._finite(kl.known, "the logits with nothing dropped (the last norm, or the head)", number)
        for i in range(m):
            before, own = _tokens(graph.before(i), counted), base[i]
            measured.cosine.add(i, 1 - F.cosine_similarity(before, before + own, dim=-1))
            measured.norm_ratio.add(i, own.norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-30))
        for i, place in enumerate(measured.places):
            if (units := graph.units(i)) is not None:
                measured.add_units(place.name, _tokens(units, counted).abs().double().sum(0).cpu(), graph.columns(i))
        for i in range(m):
            changed = graph.dropped(i)
            for j, contribution in changed.contributions.items():
                what = f"{measured.places[j].name} with {measured.places[i].name} dropped"
                new = self._checked(contribution, what, number, counted)
                measured.distance.add(i * m + j, cosine_distance(base[j], new))
            distances = kl.of(changed)
            self._finite(distances, f"the logits with {measured.places[i].name} dropped", number)
            measured.kl.add(i, distances)
        for index, (names, error, changed) in enumerate(graph.grouped()):
            counted_error = _tokens(error[..., None], counted)
            self._finite(counted_error, f"the stream with {' + '.join(names)} in parallel", number)
            measured.group.add(index, counted_error)
            distances = kl.of(changed)
            self._finite(distances, f"the logits with {' + '.join(names)} in parallel", number)
            measured.group_kl.add(index, distances)
        measured.tokens += base[-1].shape[0]

    def _checked(self, contribution: Tensor, what: str, number: int, counted: Tensor | None) -> Tensor:
        values = _tokens(contribution, counted)
        self._finite(values, what, number)
        return values

    @staticmethod
    def _finite(values: Tensor, what: str, number: int) -> None:
        if not bool(torch.isfinite(values).all()):
            raise NotFiniteError(
                f"{what}: NaN or infinity in batch {number}. Are the weights whole? Does the model overflow in this "
                "dtype? Try float32"
            )

    def result(self) -> Recording:
        """The recording of all that was measured.

        Raises:
            RecordError: nothing was.
        """
        return (self.measured or Measurements.of((), ())).recording(self.plan, self.digest)


def _tokens(values: Tensor, counted: Tensor | None) -> Tensor:
    """``[..., d]`` as float32 ``[tokens, d]``, of the positions that count."""
    return rows(values, counted).float()


def _no_single_graph(count: int) -> str:
    if count == 0:
        return (
            "no residual stream was found in the model, so nothing can be recorded; fxfuse.explain says what was seen"
        )
    return (
        f"the model's residual stream runs through {count} graphs, and a drop in one could not be followed into the "
        "next: remove the graph breaks (TORCH_LOGS=graph_breaks shows them)"
    )
