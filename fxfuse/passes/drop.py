"""Drop: a branch no longer contributes to the residual stream.

Source: LLM-Drop (arXiv 2406.15786); the no-op blocks of Puzzle (arXiv 2411.19146).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from fxfuse.graph.surgery import erase_dead, erase_empty_regions
from fxfuse.passes.base import Control, Edit, Pass, PassReport
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.runner import run
from fxfuse.passes.select import check_known, owners_of
from fxfuse.stream.branch import KEPT, Branch
from fxfuse.stream.carry import carried
from fxfuse.stream.rewrite import resum


@dataclass(frozen=True)
class Drop(Pass):
    """See :func:`drop`."""

    name = "drop"
    branches: frozenset[str]

    def run(self, graph: Canonical, control: Control) -> PassReport:
        report = PassReport(self.name)
        if not self.branches:
            return report
        check_known(self.branches, graph.streams)
        rewritten = graph.overwritten
        replaced: dict[fx.Node, fx.Node] = {}
        owners = owners_of(graph.streams)
        dropped: dict[Branch, None] = {}
        for stream in graph.streams:
            for residual in stream.sums:
                gone = [branch for branch in residual.branches if branch.name in self.branches]
                if not gone:
                    continue
                dropped.update(dict.fromkeys(gone))
                left = {term for branch in gone for term in branch.terms}
                kept_terms = [term for term in residual.terms if term not in left]
                resum(graph.graph, residual, kept_terms, replaced, rewritten)
                for branch in gone:
                    erased = erase_dead(graph.graph, [term.node for term in branch.terms])
                    for node in branch.nodes.difference(erased):
                        if owners[node] == 1:
                            node.meta[KEPT] = branch.name  # it goes on reading the stream where it stood
                    kept = len(branch.body) - sum(node in branch.nodes for node in erased)
                    detail = f"{kept} of its nodes serve others and stay" if kept else ""
                    report.done.append(Edit((branch.name,), "dropped", detail))
        erase_empty_regions(graph.graph)
        graph.carry(carried(graph.streams, graph.graph, dropped, replaced))
        return report


def drop(gm: fx.GraphModule, branches: Collection[str]) -> PassReport:
    """Take the named branches out of the stream: each sum ``h + branch(h)`` becomes ``h``.

    Factors of the stream itself stay: ``c * (a * h + b * branch(h))`` becomes ``c * (a * h)``.

    What only the branch needed is erased. A part of it that others read (its keys and values as graph outputs, a write
    to a cache) stays, and the report says so.

    Args:
        gm: any graph that has residual streams.
        branches: names.

    Raises:
        PlanError: no branch has such a name, and the message has the nearest ones; or its sum writes in place to memory
            that others read. The graph is then as it was.
    """
    return run(gm, Drop(frozenset(branches)))
