"""What layers multiply contributions with, outside of the modules that compute them (Granite's residual multiplier)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse.errors import ExportError
from fxfuse.exporting.calls import Site
from fxfuse.exporting.stream import Planned
from fxfuse.exporting.units import Unit
from fxfuse.graph.peel import PASSED, Change, layers
from fxfuse.stream.branch import Term


def factors_of(planned: Planned, sums: list[tuple[Unit, ...]], sites: Mapping[str, Site]) -> dict[str, float]:
    """By unit: the number that the stream gets its module's output times.

    The graph says by which numbers a contribution is multiplied, but not which of them a module has multiplied with
    already: that is told by the value that it returned.

    Raises:
        ExportError: a module's output is not what the stream gets, whatever the numbers.
    """
    units = [unit for units in sums for unit in units]
    wanted = {term.node for unit in units for branch in unit.branches for term in branch.terms}
    values = _Values(planned.gm, wanted)
    values.run(*planned.inputs)
    return {unit.path: _factor(unit, sites[unit.path].output, values.held) for unit in units}


class _Values(fx.Interpreter):
    """Runs a graph and holds the values of some nodes."""

    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(gm)
        self.held: dict[fx.Node, Tensor] = {}
        self._wanted = wanted

    def run(self, *args: Any) -> Any:  # type: ignore[override]  # its other arguments are not needed
        with torch.no_grad():
            return super().run(*args)

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if n in self._wanted:
            self.held[n] = made
        return made


def _factor(unit: Unit, output: Tensor, values: Mapping[fx.Node, Tensor]) -> float:
    terms = [term for branch in unit.branches for term in branch.terms]
    total = sum((_flat(values[term.node]) * term.scale.number for term in terms), torch.zeros(()))
    for number in _candidates(terms):
        if torch.allclose(total, number * _flat(output), rtol=1e-2, atol=1e-3 * float(total.abs().max())):
            return number
    raise ExportError(f"what {unit.path!r} returns is not what the stream gets: the layer does something else to it")


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu().flatten()


def _candidates(terms: list[Term]) -> Iterator[float]:
    """The numbers that could be multiplied outside of the module, none first."""
    number = terms[0].scale.number
    yield 1.0
    yield number
    if len(terms) == 1:
        for taken in layers(terms[0].node, PASSED | Change.NUMBER):
            number *= taken.scale.number
            yield number
