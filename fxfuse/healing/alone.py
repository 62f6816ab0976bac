"""Linear maps in attentions' places, each fitted as if it were the only change: all of them in one pass over the text.

This is the closed form of NBL (arXiv 2505.21077), and what tells how good an attention would be as a linear map: what
its output projection holds says nothing of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fxfuse._common.progress import bar
from fxfuse._torch.dynamo import originals_forbidden
from fxfuse.data.batches import eval_mode
from fxfuse.healing.fit import fit_step
from fxfuse.healing.mapped import mapped
from fxfuse.healing.methods import Patient, samples_of
from fxfuse.healing.text import Kind
from fxfuse.model.force import uncompiled
from fxfuse.model.stand_ins import OWN_MAP
from fxfuse.passes.linear import OwnMap
from fxfuse.plan import Plan

Maps: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""The parameters of linear maps, by their names, by the attention."""


def own_maps(maps: Maps) -> dict[str, OwnMap]:
    """Those of ``maps`` that are no output projection of the model, by the attention."""
    made: dict[str, OwnMap] = {}
    for name, weights in maps.items():
        own = f"{name}.{OWN_MAP}"
        if f"{own}.weight" in weights:
            made[name] = OwnMap(weights[f"{own}.weight"], weights.get(f"{own}.bias"))
    return made


@torch.no_grad()
def maps_alone(model: nn.Module, plan: Plan, text: Sequence[Kind], block: int = 8192, progress: bool = False) -> Maps:
    """What the maps of the attentions that ``plan`` makes linear would be, if each were the only one.

    Args:
        model: the original; it stays as it is.
        plan: its ``linear`` are the attentions. Its other edits hold.
        text: what is fitted to, and what is held out to choose the ridge by.
        block: the most inputs that are solved for at once.
        progress: show on stderr how far it is.

    Raises:
        HealError: too little text.
        PlanError, CaptureError, RecordError, NotFiniteError: as :func:`fxfuse.heal` says.
    """
    both = mapped(model, plan, text[0].fitted[0])
    patient, found = Patient(model, both, plan, tuple(text)), dict[str, Mapping[str, Tensor]]()
    with eval_mode(model, both.model), uncompiled(model), originals_forbidden():
        samples = samples_of(patient, "linear", {})
        steps = samples[0].pair.steps
        with bar("fitting linear maps", "maps", len(steps), progress) as advance:
            for step in steps:
                for sample in samples:
                    sample.pair.reach()
                weights, _ = fit_step(samples, block)
                found[step.maps[0].branch] = weights
                for sample in samples:
                    sample.pair.return_to_goal()
                advance(1)
    return found
