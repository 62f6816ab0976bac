"""Verify: what a rewrite wrote is what it replaces, measured on example inputs in float64.

Right after a rewrite both stand in the graph, so one run of the graph gives both. The run is in float64 whatever dtypes
the graph speaks of, because there a difference is a mistake and no rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, Target, map_aggregate

from fxfuse.errors import OptionError, VerifyError
from fxfuse.graph.ancestors import ancestors
from fxfuse.graph.blocks import dequantized
from fxfuse.graph.ops import FLOATING_METHODS, is_barrier, mutated_arguments
from fxfuse.stream.branch import Term

TOLERANCE = 1e-8
"""How far the two may be apart, relative to the largest value, or to 1 if that is more."""


@dataclass(frozen=True)
class Claim:
    """That in each pair the sum of the terms that were made is that of those they replace; the graph holds both."""

    pairs: Sequence[tuple[Sequence[Term], Sequence[Term]]]


class Verifier:
    """Runs a graph, as far as its rewrites go, on example inputs; never changes them, nor the graph's own tensors.

    Args:
        gm: the graph that is rewritten.
        inputs: a value for each of its placeholders; numbers for symbolic sizes.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[object]) -> None:
        placeholders = gm.graph.find_nodes(op="placeholder")
        if len(inputs) != len(placeholders):
            raise OptionError(f"inputs: the graph takes {len(placeholders)} values, and {len(inputs)} were given")
        self._gm, self._inputs = gm, inputs

    @classmethod
    def of(cls, gm: fx.GraphModule, inputs: Sequence[object] | None, verify: bool) -> Verifier | None:
        """One if it is asked for."""
        if verify and inputs is None:
            raise OptionError("verify=True needs example inputs of the graph to run it on: pass inputs=")
        return cls(gm, inputs) if verify and inputs is not None else None

    @torch.no_grad()
    def check(self, claim: Claim, what: str, names: Sequence[str]) -> None:
        """Raise VerifyError unless the claim holds; ``what`` was made of the branches of those ``names``."""
        pairs = claim.pairs
        terms = [term for pair in pairs for side in pair for term in side]
        values = self._values([node for term in terms for node in (term.node, *term.scale.nodes)])
        error = max(_distance(_total(made, values), _total(replaced, values)) for made, replaced in pairs)
        if not error <= TOLERANCE:
            raise VerifyError(
                f"{' + '.join(names)}: {what} is not what it replaces; in float64 they are {error:.1e} apart, relative "
                "to their size. This is a mistake of fxfuse: please report it; max_rewrites= leaves it out"
            )

    def _values(self, wanted: Sequence[fx.Node]) -> dict[fx.Node, Tensor]:
        run = _Float64(self._gm)
        given = dict(zip(self._gm.graph.find_nodes(op="placeholder"), self._inputs, strict=True))
        return run.values_of(wanted, given)


def _distance(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value or to 1; what is NaN in both is equal."""
    if got.shape != wanted.shape:
        return torch.inf
    error = (got - wanted).abs().masked_fill((got == wanted) | (got.isnan() & wanted.isnan()), 0.0)
    size = wanted[wanted.isfinite()].abs().max().clamp(min=1.0) if wanted.isfinite().any() else 1.0
    return float((error / size).nan_to_num(nan=torch.inf).max())


def _total(terms: Sequence[Term], values: Mapping[fx.Node, Tensor]) -> Tensor:
    parts = []
    for term in terms:
        part = values[term.node].flatten(0, -2) * term.scale.number  # the same rows, in whatever shape
        for factor in term.scale.nodes:
            part = part * values[factor]
        parts.append(part)
    return sum(parts[1:], start=parts[0])


class _Float64(fx.Interpreter):
    """Runs a graph with every floating-point value as float64, on copies of everything that it is given or holds."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._own: dict[str, object] = {}

    def values_of(self, wanted: Sequence[fx.Node], given: Mapping[fx.Node, object]) -> dict[fx.Node, Any]:
        """The values of the ``wanted`` nodes; the graph is run no further, and nothing of it that they don't need."""
        needed = _needed(self.graph, wanted)
        left = set(wanted)
        for node in self.graph.nodes:
            if node not in needed:
                continue
            self.env[node] = _double(given[node]) if node.op == "placeholder" else self.run_node(node)
            left.discard(node)
            if not left:
                break
        return {node: self.env[node] for node in wanted}

    def run_node(self, n: fx.Node) -> object:
        if is_barrier(n) and "vmap" not in str(n.target):
            return None  # of autocast and grad mode, which do not matter here
        # What is narrower still was made anew, of torch's default dtype; so nobody shares its memory.
        return map_aggregate(super().run_node(n), lambda made: _wide(made) if isinstance(made, Tensor) else made)

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> object:
        name = str(target)
        if name not in self._own:  # once, because the graph may write to it
            self._own[name] = _double(self.fetch_attr(name))
        return self._own[name]

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> object:
        return super().call_function(target, _doubled(args), _doubled(kwargs))

    def call_method(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> object:
        name = "double" if target in FLOATING_METHODS else target
        return super().call_method(name, _doubled(args), _doubled(kwargs))

    def call_module(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> object:
        name = str(target)
        if name not in self._own:
            self._own[name] = copy.deepcopy(self.fetch_attr(name)).double()
        module = self._own[name]
        assert isinstance(module, nn.Module)
        return module(*args, **kwargs)


def _needed(graph: fx.Graph, wanted: Collection[fx.Node]) -> set[fx.Node]:
    """What ``wanted`` depends on: its ancestors, whatever writes to memory, and theirs."""
    return ancestors([*wanted, *(node for node in graph.nodes if mutated_arguments(node))])


_WIDE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else _WIDE.get(dtype, dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_widened(tensor.dtype))


def _double(value: object) -> object:
    """A copy of a tensor, in float64 if it is a floating-point one; a symbolic number as the number it stands for."""
    if isinstance(value, Tensor):
        return _wide(dequantized(value.detach()).clone())
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return value.node.hint
    return value


def _doubled(arguments: Any) -> Any:  # whatever map_aggregate takes: it is not annotated more closely
    """The arguments of a call with float64 for each floating-point dtype among them."""
    return map_aggregate(arguments, lambda value: _widened(value) if isinstance(value, torch.dtype) else value)
