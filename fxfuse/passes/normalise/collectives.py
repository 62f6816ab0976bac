"""Collectives: an all-reduce that is started and waited for at once, as one op with one value. Exact.

So it comes from ``torch.distributed.all_reduce`` and from the functional collectives. The wait counts as a write of
what was started, which nobody could look through, and a wait that nobody reads would keep a dropped branch.
"""

from __future__ import annotations

from torch import fx

from fxfuse._torch.collectives import STARTS, WAITS
from fxfuse.graph.sharded import all_reduce


def join_waits(graph: fx.Graph) -> list[str]:
    """Write each all-reduce that the next node waits for as one; the names of the waits that are gone.

    One that is waited for later stays: what stands between was put there to be computed meanwhile.
    """
    gone: list[str] = []
    for start in [node for node in graph.nodes if node.target in STARTS]:
        wait = start.next
        if wait.target not in WAITS or set(start.users) != {wait}:
            continue
        value, kind, group = start.args if len(start.args) == 3 else (None, None, None)
        if start.kwargs or not isinstance(value, fx.Node) or not isinstance(kind, str) or not isinstance(group, str):
            continue
        with graph.inserting_before(start):
            made = graph.call_function(all_reduce, (value, kind, group))
        made.meta = dict(wait.meta)
        wait.replace_all_uses_with(made)
        gone.append(wait.name)
        graph.erase_node(wait)
        graph.erase_node(start)
    return gone
