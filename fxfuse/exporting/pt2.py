"""``format="pt2"``: the planned model compiled ahead of time, which torch runs without fxfuse, without transformers.

torch.export traces one call of the pruned model with a cache (:mod:`fxfuse.exporting.cached`), once for many tokens and
once for one; the plan edits both graphs as it edits those of ``torch.compile``, and AOTInductor compiles them. Both ask
for their weights by name, so one file of weights serves both, a packed weight among them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export

from fxfuse._common.progress import bar
from fxfuse._torch.aoti import compile_ahead, write_package
from fxfuse.backend.applying import of_modules
from fxfuse.backend.naming import elsewhere
from fxfuse.errors import ExportError, FxfuseError
from fxfuse.exporting.check import relative_difference
from fxfuse.exporting.request import Request
from fxfuse.graph.surgery import erase_dead
from fxfuse.graph.values import value
from fxfuse.measure.planned import Planned
from fxfuse.model import healed
from fxfuse.model.learning import trial
from fxfuse.model.pruning import prune_until
from fxfuse.packing.expressions import PACK
from fxfuse.passes.pipeline import apply_plan
from fxfuse.plan import Plan

if TYPE_CHECKING:
    from fxfuse.exporting.cached import CachedCall, CacheSpec

PACKAGE, WEIGHTS = "model.pt2", "weights.pt"

PREFILL, DECODE = "prefill", "decode"

_ROOT = "model."
"""Before the name of each weight: the attribute of the traced module that holds the model."""

_BATCH, _LENGTH, _TOTAL = 3, 5, 11  # of the examples: sizes that differ, for torch takes equal ones for one

_PADDING = 2


@dataclass(frozen=True)
class Programs:
    """The planned model as graphs of plain tensors.

    Attributes:
        graphs: prefill and decode, by name; called with tokens, a mask, and each of the caches.
        examples: what they were traced with.
        weights: all that they read, by name.
        caches: the layers that keep keys and values.
    """

    graphs: Mapping[str, fx.GraphModule]
    examples: Mapping[str, tuple[Tensor, Tensor, list[Tensor]]]
    weights: Mapping[str, Tensor]
    caches: tuple[CacheSpec, ...]


def prepare(request: Request) -> Callable[[Path], None]:
    """Trace and plan both graphs, and return what compiles and writes them: ``model.pt2`` and ``weights.pt``.

    Raises:
        ExportError: the model is no causal language model of Hugging Face, keeps more than keys and values, cannot be
            exported, or what would be written does not compute what the planned model does.
        PlanError, PruneError: the plan does not fit the model.
    """
    request.no_options("pt2")
    with bar("tracing", "graphs", 2, request.progress) as advance:
        programs = trace(request.model, request.plan, request.check, lambda: advance(1))
    metadata = _metadata(programs)

    def write(folder: Path) -> None:
        compiled = {}
        with bar("compiling", "graphs", len(programs.graphs), request.progress) as advance:
            for name, graph in programs.graphs.items():
                with _blaming(f"the {name} graph cannot be compiled ahead of time"):
                    compiled[name] = compile_ahead(graph, programs.examples[name], metadata)
                advance(1)
        with _blaming("the package or its weights cannot be written (is there room on the disk?)"):
            write_package(folder / PACKAGE, compiled)
            torch.save(dict(programs.weights), folder / WEIGHTS)

    return write


def trace(model: nn.Module, plan: Plan, check: bool = True, traced: Callable[[], object] = lambda: None) -> Programs:
    """Trace and plan both graphs.

    Args:
        model: a causal language model of Hugging Face, healed or not.
        plan: what becomes of it.
        check: compare what they compute with the planned model.
        traced: is called after each graph.

    Raises:
        ExportError, PlanError, PruneError: as :func:`prepare` does.
    """
    from transformers import PreTrainedModel

    from fxfuse.exporting.cached import CachedCall, cache_specs

    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise ExportError("pt2 is for causal language models of Hugging Face: others have caches of their own")
    healed.check(model, plan)
    leaving = of_modules(plan)
    with ExitStack() as undo:
        prune_until(undo, model, leaving, (), {})
        undo.enter_context(trial(model))
        undo.enter_context(healed.unchecked())
        specs = cache_specs(model)
        call = CachedCall(model, specs)
        graphs, examples = {}, {}
        for name, length in ((PREFILL, _LENGTH), (DECODE, 1)):
            examples[name] = call.example(length, _TOTAL, _BATCH)
            graphs[name] = _planned(call, plan, examples[name])
            traced()
        programs = Programs(graphs, examples, _weights(graphs), specs)
        if check:
            _check(programs, model, plan)
    return programs


def _planned(call: CachedCall, plan: Plan, example: tuple[Tensor, Tensor, list[Tensor]]) -> fx.GraphModule:
    """One graph, edited and fused, with what it packs as weights of its own."""
    ids, _, caches = example
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = {"ids": sizes if ids.shape[1] > 1 else {0: Dim.DYNAMIC}, "mask": sizes, "caches": [sizes] * len(caches)}
    with _blaming("torch.export cannot trace a call of the model with a cache"):
        program = export(call, example, dynamic_shapes=shapes, strict=False)
        gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    names = {node: str(node.target).removeprefix(_ROOT) for node in gm.graph.find_nodes(op="get_attr")}
    apply_plan(gm, plan, names=names, kernels="aten", elsewhere=elsewhere(call.model, names, plan))
    _store_packs(gm)
    return gm


def _store_packs(gm: fx.GraphModule) -> None:
    """Compute what the graph packs, and let it read that."""
    for number, root in enumerate([node for node in gm.graph.nodes if PACK in node.meta]):
        name = f"packed_{number}"
        gm.register_buffer(name, _computed(root))
        with gm.graph.inserting_before(root):
            stored = gm.graph.get_attr(name)
        stored.meta = {key: held for key, held in root.meta.items() if key != PACK}
        root.replace_all_uses_with(stored)
        erase_dead(gm.graph, [root])
    gm.recompile()


def _computed(root: fx.Node) -> Tensor:
    """The value of an expression of weights."""

    def compute(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return value(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), compute)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert node.op == "call_function" and callable(node.target), f"{node} depends on more than weights"
        return node.target(*args, **kwargs)

    made = compute(root)
    assert isinstance(made, Tensor)
    return made.detach()


def _weights(graphs: Mapping[str, fx.GraphModule]) -> dict[str, Tensor]:
    """The tensors that the graphs read, by name; where one name means two tensors, the later graph's gets another."""
    weights: dict[str, Tensor] = {}
    for phase, gm in graphs.items():
        for node in gm.graph.find_nodes(op="get_attr"):
            tensor, name = value(node), str(node.target)
            assert tensor is not None, f"{name} is no tensor"
            if name in weights and not _same(weights[name], tensor):
                name = node.target = f"{phase}_{name}".replace(".", "_")
                gm.register_buffer(name, tensor)
            weights.setdefault(name, tensor.detach())
        gm.recompile()
    return weights


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other)))


def _check(programs: Programs, model: nn.Module, plan: Plan) -> None:
    """Raise unless a prompt in two pieces and a token more give the planned model's logits, one row padded.

    Raises:
        ExportError: they do not.
    """
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]  # a Hugging Face model
    like = programs.examples[PREFILL][2][0]
    total = _TOTAL + _LENGTH + 1
    ids = torch.randint(vocabulary, (2, total), generator=torch.Generator().manual_seed(0)).to(like.device)
    mask = torch.ones(2, total, dtype=torch.bool, device=like.device)
    mask[1, :_PADDING] = False
    caches = [tensor for spec in programs.caches for tensor in spec.tensors(total, 2, like)]
    planned, done = Planned(model), 0
    planned.plan = plan
    for length in (_TOTAL, _LENGTH, 1):
        end = done + length
        graph = programs.graphs[DECODE if length == 1 else PREFILL]
        (made,) = graph(ids[:, done:end], mask[:, :end], [cache[:end] for cache in caches])
        for row, start in ((0, 0), (1, _PADDING)):
            output = planned(input_ids=ids[row : row + 1, start:end], use_cache=False)
            wanted = output.logits[:, -1]  # type: ignore[attr-defined]  # a Hugging Face output
            error = relative_difference(made[row], wanted[0])
            if not error <= torch.finfo(wanted.dtype).eps ** 0.5:
                raise ExportError(
                    f"what would be written is not the planned model: after {end} tokens{', padded' * row} its logits "
                    f"differ by {error:.2g} of the largest"
                )
        done = end


def _metadata(programs: Programs) -> dict[str, str]:
    """What a loader needs to allocate caches, as words: a package has room for nothing else."""
    like = programs.examples[PREFILL][2][0]
    caches = " ".join(f"{spec.heads} {spec.key} {spec.value}" for spec in programs.caches)
    return {"cache_dtype": str(like.dtype).removeprefix("torch."), "caches": caches}


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Say of an error of torch's which step it stopped. Its writer raises RuntimeError where the disk is full."""
    try:
        yield
    except (FxfuseError, OSError):
        raise
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ExportError(f"{what}: {type(error).__name__}: {first}") from error
