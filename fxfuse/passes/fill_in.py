"""Fill in: sizes for the nodes that passes wrote, for who asks them next."""

from __future__ import annotations

from dataclasses import dataclass

from fxfuse.passes.base import Control, Pass, PassReport
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.normalise.sizes import fill_in


@dataclass(frozen=True)
class FillIn(Pass):
    """Let the nodes that passes wrote know their sizes, from those of what they read, as far as that is known."""

    name = "fill_in"

    def run(self, graph: Canonical, control: Control) -> PassReport:
        fill_in(graph.gm)
        return PassReport(self.name)
