"""Apply: the planned model in place of the model, for whoever calls it: ``generate``, Trainer, lm-eval."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from fxfuse.options import Compiler, Options
from fxfuse.plan import Plan
from fxfuse.prune import prune


def apply(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str],
    inner: str | Compiler = "inductor",
    example: Mapping[str, object] | tuple[object, ...] | Tensor | None = None,
    **options: object,
) -> nn.Module:
    """Let ``model`` compute what ``plan`` says from now on, in place: prune it, then ``model.compile``.

    Args:
        model: any module; its class, its ``state_dict`` keys and its methods stay.
        plan: the plan, or the path of one.
        inner: the compiler of the rewritten graphs; "eager" runs the planned model uncompiled.
        example: the arguments of one call, from which pruning learns what the dropped modules return; a Hugging Face
            model needs none, and a plan that drops nothing neither.
        options: other options of the backend, see :class:`fxfuse.options.Options`.

    Raises:
        PlanError, OptionError: the plan or an option is not valid.
        PruneError: a dropped branch cannot leave the model; the model is then as it was.
    """
    given: dict[str, object] = {"plan": plan, "inner": inner, **options}
    chosen = Options.parse(given)
    given["plan"], edits = chosen.plan, chosen.edits  # a file that changes later must not part pruning from compiling
    leaving = Plan(drop=tuple(name for name in edits.drop if not name.startswith("@")))
    if isinstance(example, Mapping):
        prune(model, leaving, **example)
    elif isinstance(example, tuple):
        prune(model, leaving, *example)
    elif example is not None:
        prune(model, leaving, example)
    else:
        prune(model, leaving)
    model.compile(backend="ffnfuse", options=given)
    return model
