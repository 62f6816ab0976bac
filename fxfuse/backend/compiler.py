"""The backend ``ffnfuse``: a plan applied, what it made parallel fused, the rest left to another compiler.

``torch.compile(model, backend="ffnfuse", options={"plan": plan})``. torch finds it through the entry point
``torch_dynamo_backends``; nothing need be imported. Without a plan it is exact.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx

from fxfuse._torch.collectives import local_tensor
from fxfuse._torch.dynamo import backend_named, never_original, page
from fxfuse._torch.fake import mode_of
from fxfuse._torch.inductor import compile_graph, options_of_mode
from fxfuse._torch.sources import forget_inputs
from fxfuse._torch.tracing import update_options
from fxfuse.backend.agreement import agree
from fxfuse.backend.frontend import take
from fxfuse.backend.naming import compiled_root, elsewhere, for_root
from fxfuse.backend.options import Options
from fxfuse.cpu import with_linear_maps
from fxfuse.cpu.prepack import Prepack
from fxfuse.errors import OptionError, PlanError
from fxfuse.graph.blocks import like
from fxfuse.graph.surgery import transaction
from fxfuse.model import healed
from fxfuse.model.force import told
from fxfuse.packing.calls import PackedCall
from fxfuse.packing.recipe import Recipe, extract
from fxfuse.passes.fill_in import FillIn
from fxfuse.passes.pipeline import FOUND, REPORTS, apply_plan
from fxfuse.plan import PlanFile
from fxfuse.stream.branch import Branch
from fxfuse.stream.diagnosis import REPORT, census
from fxfuse.stream.finder import ResidualStream

log = logging.getLogger(__name__)


def ffnfuse(
    gm: fx.GraphModule,
    example_inputs: list[Tensor],
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., object]:
    """Compile one graph of Dynamo. See :class:`fxfuse.backend.options.Options` for the options.

    Raises:
        OptionError: an unknown option or a bad value.
        PlanError: the plan does not fit the model, or the model was healed for another.
        VerifyError: under the option ``verify``, a fusion that is not what it replaces.
    """
    if (options or {}).get("plan") is not None:
        never_original()  # which is not the planned model
    chosen = Options.parse(options or {})
    _remember(chosen)
    root = compiled_root()
    if root is not None:
        healed.check(root, chosen.edits)
    plan = for_root(chosen.edits, root)
    captured = take(gm, example_inputs, root, alone=bool(plan))
    gm, names = captured.gm, captured.names
    agree(gm, plan, names.values())
    with transaction(gm, restore=False):
        apply_plan(
            gm,
            plan,
            names=names,
            strict=chosen.strict,
            weights=chosen.weights,
            merge_gate_up=chosen.merge_gate_up,
            kernels=chosen.kernels,
            elsewhere=elsewhere(root, names, plan),
            inputs=example_inputs if chosen.verify else None,
            verify=chosen.verify,
            max_rewrites=chosen.max_rewrites,
            dump=_dump_folder(chosen.dump),
            seen=partial(_hint, gm) if chosen.plan is None else lambda streams: None,
            then=[FillIn(), *([Prepack()] if chosen.prepack and not _trains(example_inputs) else [])],
        )
        recipes = extract(gm)
    _trace(gm)
    compiler = _inner(chosen, mode)
    if not recipes:
        compiled = compiler(gm, example_inputs)
    else:
        compiled = call = PackedCall(recipes, chosen.weights)
        call.compiled = compiler(gm, [*example_inputs, *_packed_examples(recipes, call, example_inputs)])
    forget_inputs(gm.graph)
    return told(compiled) if plan else compiled


def _dump_folder(dump: str | None) -> Path | None:
    """The folder of this graph, the first that does not exist yet, in that of the option ``dump``."""
    if dump is None:
        return None
    number = next(number for number in itertools.count() if not Path(dump, f"graph{number}").exists())
    return Path(dump, f"graph{number}")


def _remember(chosen: Options) -> None:
    """Let torch.compile's wrapper hold options of its own, with the plan that was read and not only its path.

    It compares its options with those of earlier calls to decide whether their graphs serve it too. So a file or a
    dict that has changed since makes the two differ, and all graphs of one call follow one plan.
    """
    update_options({"plan": chosen.plan} if isinstance(chosen.plan, PlanFile) else {})


def _inner(chosen: Options, mode: str | None) -> Callable[[fx.GraphModule, list[Tensor]], Callable[..., object]]:
    """The compiler of the rewritten graph."""
    if not isinstance(chosen.inner, str):
        return chosen.inner
    if chosen.inner == "inductor":
        patches = dict(chosen.inner_options)
        if mode is not None:
            patches = {**options_of_mode(mode), **patches}

        def inductor(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
            own = patches if _trains(inputs) else with_linear_maps(gm, patches)
            if chosen.prepack:
                own = {"size_asserts": False, **own}  # prepacked weights have no strides to assert
            return compile_graph(gm, inputs, own)

        return inductor
    if mode is not None:
        raise OptionError(f"mode={mode!r} is inductor's; option 'inner' is {chosen.inner!r}")
    if chosen.inner == "ffnfuse":
        raise OptionError("option 'inner' cannot be 'ffnfuse' itself")
    if chosen.inner not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise OptionError(f"option 'inner': no backend {chosen.inner!r}; there are {known}")
    return backend_named(chosen.inner)


def _trains(inputs: Sequence[object]) -> bool:
    """Whether a graph computes gradients."""
    return torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs)


def _packed_examples(recipes: Sequence[Recipe], call: PackedCall, example_inputs: list[Tensor]) -> list[Tensor]:
    """The packed tensors as the inner compiler wants to see them: fake, of fixed sizes.

    The real ones wait for the first call: sharing moves the weights, which the compiler has yet to look at.

    Raises:
        PlanError: weights that the model computes by an op that cannot be run without values.
    """
    mode = mode_of(example_inputs)
    if mode is None:
        return list(call.tensors(example_inputs))
    fakes = []
    for recipe in recipes:
        members = [example_inputs[index] for index in recipe.inputs]
        try:
            with torch.no_grad(), mode:
                made = recipe([like(member, _fake) for member in members])
                fake = like(made, _fake)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise PlanError(
                f"{recipe.what} cannot be packed: the model computes these weights by an op that torch cannot run "
                f"without their values ({error}); keep their branches out of the plan, or store what is computed"
            ) from error
        grad = torch.is_grad_enabled() and any(member.requires_grad for member in members)
        fakes.append(fake.requires_grad_() if grad else fake)
    return fakes


def _fake(member: Tensor) -> Tensor:
    """Something like what this process holds of ``member``, made under a fake mode: a tensor without values."""
    member = local_tensor(member)
    return torch.empty_strided(member.shape, member.stride(), dtype=member.dtype, device=member.device)


def _hint(gm: fx.GraphModule, streams: Sequence[ResidualStream]) -> None:
    """Without a plan: one line on what one could do here."""
    branches = [branch for stream in streams for branch in stream.branches]
    fusable = [branch for branch in branches if branch.ffn is not None]
    if len(fusable) > 1:
        log.warning("no plan, so nothing changes: %s", _possible(branches, fusable))
    elif not branches and sum((seen := census(gm)).products.values()) > 1:
        log.warning("no residual stream found, so no plan can change this graph: %s; %s", seen, REPORT)


def _possible(branches: list[Branch], fusable: list[Branch]) -> str:
    attentions = sum(branch.kind == "attention" for branch in branches)
    return (
        f"{len(fusable)} FFNs and {attentions} attentions found; a plan that groups FFNs, such as "
        f'fxfuse.Plan(parallel=[["{fusable[-2].name}", "{fusable[-1].name}"]]), makes each group one wide FFN; '
        "fxfuse.calibrate(compiled) finds one"
    )


def _trace(gm: fx.GraphModule) -> None:
    """A page in tlparse, and ``TORCH_LOGS="+fxfuse"``, of what was done."""
    text = "\n".join([gm.meta[FOUND], *map(str, gm.meta[REPORTS])])
    page("fxfuse_passes", text)
