"""The data by which a model of transformers is edited when it is built: :mod:`fxfuse.exporting.copied.planned_edit`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxfuse.errors import ExportError
from fxfuse.exporting.blocks import PlannedLayer, Points
from fxfuse.exporting.calls import Site
from fxfuse.exporting.reading import linear_map_of
from fxfuse.exporting.stream import Planned
from fxfuse.exporting.units import Unit
from fxfuse.exporting.weights import Expressions, Weight
from fxfuse.exporting.wide import Part, Wide, joined, part_of
from fxfuse.ffn.affine import unfoldable
from fxfuse.ffn.rms import rms
from fxfuse.graph.ops import op
from fxfuse.graph.peel import PASSED, Change, peel
from fxfuse.graph.values import dtype
from fxfuse.plan import Member

Tree = dict[str, Any]


@dataclass
class Trees:
    """Writes the data of a planned model, and collects the weights that its own modules have not.

    Attributes:
        planned: the stream.
        units: by path.
        sites: how they are called.
        factors: what the layer multiplies their outputs with.
        base: the path of the base model and a dot, which paths in the data leave out.
        made: new weights, by the key of the module in the data and the name in the module.
        wide: of which units each wide FFN is made.
    """

    planned: Planned
    units: Mapping[str, Unit]
    sites: Mapping[str, Site]
    factors: Mapping[str, float]
    base: str
    made: dict[tuple[int, str], Weight] = field(default_factory=dict)
    wide: list[tuple[str, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._write = Expressions(self.planned.gm, self.planned.inputs, self.planned.names)
        self._number = 0
        self._key = 0

    def blocks(self, layers: Sequence[PlannedLayer]) -> list[Tree]:
        """The entry ``blocks`` of the data."""
        made: list[Tree] = []
        for layer in layers:
            number = int(layer.host.rpartition(".")[2])
            if layer.changed:
                made.append({"layer": number, "slots": [self._slot(layer, path) for path in layer.points]})
            else:
                made.append({"layer": number, "cache": self._number})
                self._number += 1
            made += [{"layer": None} for _ in layer.attentions[1:]]
        return made

    def _slot(self, layer: PlannedLayer, path: str) -> Tree:
        site, points = self.sites[path], layer.points[path]
        inside = [each for each in (*site.before, *site.after) if each.startswith(f"{layer.host}.")]
        return {
            "path": path.removeprefix(f"{layer.host}."),
            "idle": [each.removeprefix(f"{layer.host}.") for each in inside],
            "takes": site.takes,
            "returns": site.returns,
            "tree": self._points(points, self.factors[path]) if points else None,
        }

    def _points(self, points: Points, over: float) -> Tree:
        """Points one after the other, their contributions over ``over``, which the layer multiplies the sum with."""
        made = [self._point(point, over) for point in points]
        return made[0] if len(made) == 1 else {"chain": made, "scale": over}

    def _point(self, members: Sequence[Member], over: float) -> Tree:
        trees: list[Tree] = []
        taken: set[str] = set()
        for alike in self._alike(members):
            trees.append(self._wide(alike, over))
            taken |= {part.branch.name for part in alike}
        for member in members:
            if isinstance(member, str):
                if member not in taken:
                    trees.append(self._unit(member, over))
            else:
                trees.append({"chain": [self._point([path], over) for path in member], "scale": over})
        return trees[0] if len(trees) == 1 else {"sum": trees}

    def _alike(self, members: Sequence[Member]) -> list[list[Part]]:
        """The FFNs among the members that are one, by twos or more; and those that are narrowed."""
        found: dict[Hashable, list[Part]] = {}
        for member in members:
            if isinstance(member, str) and len(self.units[member].branches) == 1:
                part = part_of(self.units[member].branches[0], self.planned.plan)
                if not isinstance(part, str) and (norm := self._norm(part)) is not None:
                    found.setdefault((*norm, part.activation.name, part.activation.up is None), []).append(part)
        narrow = self.planned.plan.narrow
        return [parts for parts in found.values() if len(parts) > 1 or parts[0].branch.name in narrow]

    def _norm(self, part: Part) -> tuple[str | None, float, torch.dtype | None] | None:
        """The kind and eps of a norm that can be done without its gain, and what it is read in; None if it cannot."""
        affine, read = part.ffn.normed, part.branch.read
        casts = PASSED | Change.ROUND
        if unfoldable(affine):
            return None
        given = dtype(part.ffn.down.weight)
        if peel(affine.bare, casts) is peel(read, casts):
            return (None, 0.0, given)
        found = op(affine.bare)
        narrow = "32" if dtype(affine.bare) == torch.float32 or _inner_dtype(affine.bare) == torch.float32 else ""
        if (root := rms(affine)) is not None and peel(root[0], casts) is peel(read, casts):
            return (f"rms{narrow}", root[1], given)
        eps = found.args.get("eps", 1e-5) if found is not None and found.name == "layer_norm" else None
        source = found.node("input") if found is not None else None
        if isinstance(eps, int | float) and source is not None and peel(source, casts) is peel(read, casts):
            return (f"layer{narrow}", float(eps), given)
        return None

    def _wide(self, parts: Sequence[Part], over: float) -> Tree:
        norm = self._norm(parts[0])
        assert norm is not None
        made = joined(parts, self._write, fold=True, over=over)
        names = {"gate": "gate_proj" if made.up is not None else "up_proj", "up": "up_proj", "down": "down_proj"}
        self._keep(made, names)
        self.wide.append(tuple(part.branch.name for part in parts))
        wide = {
            "key": self._key - 1,
            "norm": norm[0],
            "eps": norm[1],
            "width": made.down.shape[0],
            "hidden": made.gate.shape[0],
            "activation": parts[0].activation.name,
            "gated": made.up is not None,
            "biases": {"gate": made.gate_bias is not None, "up": made.up_bias is not None,
                       "down": made.down_bias is not None},
        }  # fmt: skip
        return {"wide": wide, "before": [], "after": []}

    def _keep(self, made: Wide, names: Mapping[str, str]) -> None:
        for own, name in names.items():
            for weight, what in ((getattr(made, own), "weight"), (getattr(made, f"{own}_bias"), "bias")):
                if weight is not None:
                    self.made[self._key, f"{name}.{what}"] = weight
        self._key += 1

    def _unit(self, path: str, over: float) -> Tree:
        if path in self.planned.plan.narrow:
            raise ExportError(
                f"{path!r} is narrowed, so that its own modules do not serve, and its norm, its activation or its form "
                "is one that this format has no other module for"
            )
        site, unit = self.sites[path], self.units[path]
        tree: Tree = {
            "before": [self._own(each) for each in site.before],
            "after": [self._own(each) for each in site.after],
            "scale": self.factors[path] / over,
        }
        if path in self.planned.plan.linear or unit.branches[0].kind == "linear":
            return tree | self._linear(unit)
        call = {"takes": site.takes, "all": site.caches, "picks": site.picks}
        if site.others and not site.caches:
            raise ExportError(f"{path!r} is called with more than its input, and it is not known where that comes from")
        if site.caches:
            call["cache"] = self._number
            self._number += 1
        return tree | {"core": self._own(path)} | call

    def _linear(self, unit: Unit) -> Tree:
        output = linear_map_of(unit.branches[0], self.planned)
        rows, bias = self._write.rows(output), self._write.bias(output)
        key, self._key = self._key, self._key + 1
        self.made[key, "weight"] = rows
        if bias is not None:
            self.made[key, "bias"] = bias
        return {"linear": {"key": key, "width": rows.shape[0], "bias": bias is not None}}

    def _own(self, path: str) -> str:
        return path.removeprefix(self.base)


def _inner_dtype(node: Any) -> torch.dtype | None:
    """The dtype that a norm which is written out computes in, before it is cast back."""
    return dtype(peel(node, Change.WIDEN | Change.ROUND))
