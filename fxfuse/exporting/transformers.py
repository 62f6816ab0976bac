"""transformers: any causal language model of Hugging Face whose branches are modules, as a folder with its own code.

The folder has a small modelling file: the model's own class, built by its own config and then edited by data
(:mod:`fxfuse.exporting.copied.planned_edit`). It loads by ``from_pretrained(folder, trust_remote_code=True)``, runs
under ``generate``, and engines that serve models of transformers serve it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse._common.progress import bar
from fxfuse.errors import ExportError
from fxfuse.exporting import copied
from fxfuse.exporting.blocks import PlannedLayer, planned_layers
from fxfuse.exporting.calls import sites_of
from fxfuse.exporting.check import check_folder
from fxfuse.exporting.code import base_of, class_of, code_of, model_type_of
from fxfuse.exporting.copied import planned_edit
from fxfuse.exporting.factors import factors_of
from fxfuse.exporting.request import Request
from fxfuse.exporting.stream import Planned
from fxfuse.exporting.tensors import write_weights
from fxfuse.exporting.trees import Trees
from fxfuse.exporting.units import points_of, units_of
from fxfuse.exporting.weights import Weight

PER_LAYER = "per_layer_config.json"
"""What transformers' own ``per_layer_config`` would say of the plan, for tools that come to read that."""


def prepare(request: Request) -> Callable[[Path], None]:
    """See that the planned model can be said, and return what writes it.

    Raises:
        ExportError: it cannot.
    """
    request.no_options("transformers")
    model = request.model
    base = base_of(model)
    planned = request.planned()
    path = _layers_of(model, planned)
    sums = units_of(planned, path)
    units = {unit.path: unit for each in sums for unit in each}
    points = points_of(sums, planned.plan)
    sites = sites_of(model, list(units.values()), request.example)
    layers = planned_layers(points, sums, sites, planned.plan)
    trees = Trees(planned, units, sites, factors_of(planned, sums, sites), f"{base}.")
    blocks = trees.blocks(layers)
    original, own = _attributes(model, path, layers)
    data = {"layers": path.removeprefix(f"{base}."), "original": original, "blocks": blocks}
    config = _config(model, own, data)
    weights = _weights(model, config, trees)

    def write(folder: Path) -> None:
        shutil.copyfile(Path(copied.__path__[0]) / "planned_edit.py", folder / "planned_edit.py")
        for name, text in code_of(model).items():
            (folder / name).write_text(text)
        total = sum(weight.size for weight in weights.values())
        with bar("writing weights", "bytes", total, request.progress) as done:
            write_weights(folder, weights, done=done)
        (folder / PER_LAYER).write_text(json.dumps(_per_layer(trees, model), indent=2) + "\n")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if request.check:
            check_folder(folder, class_of(model), planned, request)

    return write


def _layers_of(model: nn.Module, planned: Planned) -> str:
    """The path of the list of layers that the first branch is in."""
    first = planned.stream.branches[0].name
    parts = first.split(".")
    paths = [".".join(parts[:count]) for count in range(1, len(parts))]
    found = [path for path in paths if isinstance(model.get_submodule(path), nn.ModuleList)]
    if not found:
        raise ExportError(f"{first!r} is in no list of layers")
    return found[0]


def _attributes(
    model: nn.Module, path: str, layers: Sequence[PlannedLayer]
) -> tuple[dict[str, object], dict[str, object]]:
    """The entries of the config that count layers, or have one for each: the original's, and the planned model's.

    Raises:
        ExportError: attentions that are computed at one point are of different kinds by such a list.
    """
    config: Any = model.config
    held: Mapping[str, object] = config.to_dict()
    count = len(list(model.get_submodule(path).children()))
    numbers = [[_number(name, path) for name in layer.attentions] for layer in layers]
    flat = [number for each in numbers for number in each]
    name = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    original: dict[str, object] = {name: count}
    own: dict[str, object] = {name: len(flat)}
    for key, value in held.items():
        if not isinstance(value, list) or len(value) != count or not any(word in key for word in _LISTS):
            continue
        for layer, each in zip(layers, numbers, strict=True):
            if any(value[number] != value[each[0]] for number in each):
                raise ExportError(
                    f"{' and '.join(layer.attentions)} would be computed in one layer, and their {key} differ"
                )
        original[key], own[key] = value, [value[number] for number in flat]
    return original, own


_LISTS = ("layer", "type", "block")
"""A word of these is in the names of a config's lists that have an entry for each layer."""


def _number(name: str, layers: str) -> int:
    """The number of the layer that a module is in."""
    return int(name.removeprefix(f"{layers}.").partition(".")[0])


def _config(model: nn.Module, own: Mapping[str, object], data: Mapping[str, object]) -> dict[str, object]:
    given: Any = model.config
    held: dict[str, object] = {**given.to_dict(), **own}
    for name in ("_name_or_path", "fxfuse", "quantization_config"):
        held.pop(name, None)
    held["architectures"] = ["PlannedForCausalLM"]
    held["model_type"] = model_type_of(model)
    held["auto_map"] = {
        "AutoConfig": "configuration_planned.PlannedConfig",
        "AutoModel": "modeling_planned.PlannedModel",
        "AutoModelForCausalLM": "modeling_planned.PlannedForCausalLM",
    }
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    held["dtype"] = str(dtype).removeprefix("torch.")
    held["planned"] = data
    made: dict[str, object] = json.loads(json.dumps(held))
    return made


def _weights(model: nn.Module, config: Mapping[str, object], trees: Trees) -> dict[str, Weight]:
    """All tensors of the edited model, by their names there."""
    kind: Any = type(model)
    given: Any = model.config
    with torch.device("meta"):
        skeleton: Any = kind(type(given)(**{k: v for k, v in given.to_dict().items() if k != "fxfuse"}))
    names = {id(tensor): name for name, tensor in skeleton.state_dict(keep_vars=True).items()}
    with torch.device("meta"):
        planned_edit.edit(skeleton.base_model, config["planned"])  # type: ignore[arg-type]  # made above
    keys = {name: int(part.key) for name, part in skeleton.named_modules() if hasattr(part, "key")}
    held: dict[str, Tensor] = model.state_dict(keep_vars=True)
    weights: dict[str, Weight] = {}
    written: set[int] = set()
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        above = next((path for path in keys if name.startswith(f"{path}.")), None)
        if above is not None:
            weights[name] = trees.made[keys[above], name.removeprefix(f"{above}.")]
            continue
        old = names[id(tensor)]
        if old not in held:
            raise ExportError(f"{old!r} is needed, and has left the model: give the model as it was before")
        if id(held[old]) in written:
            continue  # tied: whoever loads it ties it again
        written.add(id(held[old]))
        weights[name] = Weight(tuple(held[old].shape), held[old].dtype, held[old].detach().cpu, (old,))
    return weights


def _per_layer(trees: Trees, model: nn.Module) -> dict[str, object]:
    """``per_layer_config`` of the original's layers: what is skipped, and how wide an FFN is."""
    plan = trees.planned.plan
    made: dict[int, dict[str, object]] = {}

    layers = _layers_of(model, trees.planned)

    def entry(path: str) -> dict[str, object]:
        return made.setdefault(_number(path, layers), {})

    def skip(path: str, what: str) -> None:
        skipped = entry(path).setdefault("skip", [])
        assert isinstance(skipped, list)
        skipped.append(what)

    for name in plan.drop:
        # What stands in the place of a module that was pruned away has its number in the cache, too.
        skip(name, "attention" if hasattr(model.get_submodule(name), "layer_idx") else "mlp")
    widths = {key: weight.shape[0] for (key, name), weight in trees.made.items() if name == "up_proj.weight"}
    for group, width in zip(trees.wide, widths.values(), strict=True):
        entry(group[0])["intermediate_size"] = width
        for name in group[1:]:
            skip(name, "mlp")
    return {str(number): made[number] for number in sorted(made)}
