"""Drop: a branch no longer contributes to the residual stream.

Source: LLM-Drop (arXiv 2406.15786); the no-op blocks of Puzzle (arXiv 2411.19146).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from torch import fx

from fxfuse.graph.order import overwritten
from fxfuse.graph.surgery import erase_dead, erase_empty_regions, transaction
from fxfuse.passes.base import Edit, PassReport
from fxfuse.passes.normalise.normal import normal_streams
from fxfuse.passes.select import check_known
from fxfuse.stream.branch import KEPT
from fxfuse.stream.finder import ResidualStream
from fxfuse.stream.rewrite import resum


def drop(gm: fx.GraphModule, branches: Collection[str], streams: Sequence[ResidualStream] | None = None) -> PassReport:
    """Take the named branches out of the stream: each sum ``h + branch(h)`` becomes ``h``.

    Factors of the stream itself stay: ``c * (a * h + b * branch(h))`` becomes ``c * (a * h)``.

    What only the branch needed is erased. A part of it that others read (its keys and values as graph outputs, a write
    to a cache) stays, and the report says so.

    Args:
        gm: any graph that has residual streams.
        branches: names.
        streams: those of ``gm`` as it stands, if the caller has just found them.

    Raises:
        PlanError: no branch has such a name, and the message has the nearest ones; or its sum writes in place to memory
            that others read. The graph is then as it was.
    """
    report = PassReport("drop")
    if not branches:
        return report
    with transaction(gm):
        streams = normal_streams(gm) if streams is None else streams
        check_known(branches, streams)
        rewritten = overwritten(gm.graph)
        replaced: dict[fx.Node, fx.Node] = {}
        owners = Counter(node for stream in streams for branch in stream.branches for node in branch.nodes)
        for stream in streams:
            for each in stream.sums:
                gone = [branch for branch in each.branches if branch.name in branches]
                if not gone:
                    continue
                left = {term for branch in gone for term in branch.terms}
                resum(gm.graph, each, [term for term in each.terms if term not in left], replaced, rewritten)
                for branch in gone:
                    erased = erase_dead(gm.graph, [term.node for term in branch.terms])
                    for node in branch.nodes.difference(erased):
                        if owners[node] == 1:
                            node.meta[KEPT] = branch.name  # it goes on reading the stream where it stood
                    kept = len(branch.body) - sum(node in branch.nodes for node in erased)
                    detail = f"{kept} of its nodes serve others and stay" if kept else ""
                    report.done.append(Edit((branch.name,), "dropped", detail))
        erase_empty_regions(gm.graph)
    return report
