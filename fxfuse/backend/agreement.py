"""That processes which share a model follow one plan: else they add up parts of different models, silently.

Each process writes the plans that it compiles a model under to the store of the job, and looks at what the others have
written. Nobody waits for anybody: the later one sees that they differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch.distributed as dist
from torch import fx

from fxfuse._torch.collectives import default_store, ranks_of
from fxfuse.errors import PlanError
from fxfuse.graph.sharded import groups_of
from fxfuse.plan import Plan

_FOLLOWED: dict[str, list[str]] = {}
"""Digests of the plans that this process has compiled each model under, in order; of a model by its weights' names."""


def agree(gm: fx.GraphModule, plan: Plan, names: Iterable[str]) -> None:
    """Note that this process compiles a graph of the weights ``names`` under ``plan``.

    Raises:
        PlanError: a process that shares the model has compiled it under another plan.
    """
    groups = groups_of(gm.graph) if dist.is_available() and dist.is_initialized() else []
    if not groups:
        return
    model = "fxfuse/" + hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    own, edits = _FOLLOWED.setdefault(model, []), plan.digest
    if edits not in own:
        own.append(edits)
    store, rank = default_store(), dist.get_rank()
    store.set(f"{model}/{rank}", json.dumps(own))
    for other in sorted({member for group in groups for member in ranks_of(group)} - {rank}):
        key = f"{model}/{other}"
        theirs = json.loads(store.get(key)) if store.check([key]) else []
        differ = next((pair for pair in zip(own, theirs, strict=False) if pair[0] != pair[1]), None)
        if differ is not None:
            raise PlanError(
                f"process {other} follows another plan for this model (digest {differ[1][:8]}) than this one, process "
                f"{rank} ({differ[0][:8]}), and they add up parts of it: give all processes that share a model one plan"
            )
