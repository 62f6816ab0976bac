"""A graph in canonical form, and what is known of it: found once, and anew after a pass has rewritten it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import fx

from fxfuse.graph import order
from fxfuse.stream.finder import ResidualStream, find_streams

_FACTS = ("streams", "hazards", "regions", "overwritten")


class Canonical:
    """What passes ask about a graph. They may go on using what they were told while they rewrite it.

    Args:
        gm: a graph in canonical form (`fxfuse.passes.normalise`).
        names: the dotted names of weights, by node, where the caller knows better than the graph.
    """

    def __init__(self, gm: fx.GraphModule, names: Mapping[fx.Node, str] | None = None) -> None:
        self.gm, self._names = gm, names
        self._carried: tuple[ResidualStream, ...] | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    @cached_property
    def streams(self) -> tuple[ResidualStream, ...]:
        """The residual streams with their branches."""
        return find_streams(self.gm, self._names)

    @cached_property
    def hazards(self) -> dict[fx.Node, set[fx.Node]]:
        """What must stay before each node, though it does not read it."""
        return order.hazards(self.graph)

    @cached_property
    def regions(self) -> Mapping[fx.Node, int]:
        """Of each node, the autocast or no_grad region that it stands in."""
        return order.regions(self.graph)

    @cached_property
    def overwritten(self) -> set[fx.Node]:
        """The nodes whose memory is written after they were computed."""
        return order.overwritten(self.graph)

    def carry(self, streams: tuple[ResidualStream, ...] | None) -> None:
        """Let the pass that runs say which streams its rewrite leaves, so that nobody has to find them anew."""
        self._carried = streams

    def forget(self) -> None:
        """The graph was rewritten: know of it no more than the pass that did so has carried over."""
        for fact in _FACTS:
            vars(self).pop(fact, None)
        if self._carried is not None:
            self.streams, self._carried = self._carried, None
