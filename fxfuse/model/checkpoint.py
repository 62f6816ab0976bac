"""What a plan has made of a model's modules, from a checkpoint: those who load it know nothing of that."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fxfuse._common.units import Narrowed
from fxfuse.errors import LoadError
from fxfuse.model.healed import maps_of, unchecked
from fxfuse.model.mark import ENTRY, read_mark
from fxfuse.model.pruning import prune_until
from fxfuse.model.stand_ins import OWN_MAP
from fxfuse.plan import Plan


def narrowed_at(folder: Path) -> Narrowed:
    """The FFNs of a checkpoint that have fewer units than its config says, and the units that they kept."""
    config: object = json.loads((folder / "config.json").read_text())
    entry = config.get(ENTRY) if isinstance(config, dict) else None
    return Narrowed() if entry is None else read_mark(entry).narrow.narrow


@torch.no_grad()
def load_planned(model: nn.Module, folder: Path) -> None:
    """Give ``model``, in place, what its mark speaks of, with the weights from ``folder``.

    That are linear maps of attentions, and FFNs with fewer units than the config says.

    Args:
        model: what ``from_pretrained`` made of the folder; most have no such mark, and stay as they are.
        folder: that ``save_pretrained`` has written.

    Raises:
        LoadError: a weight is not there, or has another shape.
        PruneError: a map cannot be put in its place.
        PlanError: the mark is none.
    """
    maps, narrow = maps_of(model), narrowed_at(folder)
    if not maps and not narrow:
        return
    with unchecked():
        prune_until(ExitStack(), model, Plan(linear=maps, narrow=narrow), (), {})
    parameters = {
        f"{name}.{OWN_MAP}.{own}": parameter
        for name in maps
        for own, parameter in model.get_submodule(f"{name}.{OWN_MAP}").named_parameters()
    }
    for name in narrow:
        parameters |= model.get_submodule(name).named_parameters(prefix=name)
    missing = set(parameters)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in missing.intersection(file.keys()):
                    parameters[name].copy_(file.get_tensor(name))
                    missing.remove(name)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise LoadError(f"{str(path)!r} cannot be read ({error})") from error
    if missing:
        raise LoadError(f"{folder} lacks {min(missing)!r}, which its config.json speaks of: was it saved whole?")
