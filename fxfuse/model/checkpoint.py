"""The linear maps that attentions have of their own, from a checkpoint: those who load it know nothing of them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fxfuse.errors import LoadError
from fxfuse.model.healed import maps_of, unchecked
from fxfuse.model.pruning import prune_until
from fxfuse.model.stand_ins import OWN_MAP
from fxfuse.plan import Plan


@torch.no_grad()
def load_maps(model: nn.Module, folder: Path) -> None:
    """Give ``model``, in place, the linear maps that its mark speaks of, with their weights from ``folder``.

    Args:
        model: what ``from_pretrained`` made of the folder; most have no such mark, and stay as they are.
        folder: that ``save_pretrained`` has written.

    Raises:
        LoadError: a weight is not there, or has another shape.
        PruneError: a map cannot be put in its place.
    """
    maps = maps_of(model)
    if not maps:
        return
    with unchecked():
        prune_until(ExitStack(), model, Plan(linear=maps), (), {})
    parameters = {
        f"{name}.{OWN_MAP}.{own}": parameter
        for name in maps
        for own, parameter in model.get_submodule(f"{name}.{OWN_MAP}").named_parameters()
    }
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
