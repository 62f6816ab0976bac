"""Add in the kernel: a wide FFN that fxfuse's kernels compute adds itself to the stream. Exact.

It is their second half's last step, on numbers that are at hand there: one launch and one pass over the stream less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxfuse.graph.values import dtype, same_shape, shape, value
from fxfuse.passes.base import Fusion, PassReport
from fxfuse.passes.canonical import Canonical
from fxfuse.passes.emit.kernel import WIDE_FFN
from fxfuse.passes.verify import Claim
from fxfuse.stream.branch import Term

_RESIDUAL = 3
"""The place of what is added to, among the arguments of the op."""


@dataclass(frozen=True)
class _Added:
    """A wide FFN, the point of the stream that it is added to, and their sum."""

    ffn: fx.Node
    point: fx.Node
    total: fx.Node

    @property
    def names(self) -> tuple[str, ...]:
        return (self.ffn.name,)

    detail = ""


@dataclass(frozen=True)
class AddInKernel(Fusion[_Added]):
    """Let each wide FFN that fxfuse's kernels compute add its contribution to the stream, where nothing else reads it.

    A wide FFN is named by its node: what it is made of, the report of :func:`fxfuse.passes.fuse_ffn` says.
    """

    name, verb, done, product = "add_in_kernel", "add in the kernel", "added in the kernel", "its sum with the stream"

    def find(self, graph: Canonical, report: PassReport) -> list[_Added]:
        calls = graph.graph.find_nodes(op="call_function", target=WIDE_FFN)
        return [found for found in map(_added, calls) if found is not None]

    def write(self, graph: Canonical, rewrites: Sequence[_Added]) -> Iterator[tuple[_Added, Claim]]:
        for rewrite in rewrites:
            total = rewrite.total
            with graph.graph.inserting_before(total):  # the stream may be made after what the FFN reads
                made = graph.graph.node_copy(rewrite.ffn)
            point = total.args[0]  # an earlier rewrite may have made it anew
            made.update_arg(_RESIDUAL, point)
            made.meta = dict(total.meta)
            yield rewrite, Claim([([Term(made)], [Term(total)])])
            total.replace_all_uses_with(made)
            graph.graph.erase_node(total)
            graph.graph.erase_node(rewrite.ffn)


def _added(ffn: fx.Node) -> _Added | None:
    """The sum of the stream and of a wide FFN that nothing else reads."""
    if ffn.args[_RESIDUAL] is not None or len(ffn.users) != 1:
        return None
    (total,) = ffn.users
    point, *rest = total.args if total.target is torch.add and not total.kwargs else (None,)
    source = ffn.args[0]
    if rest != [ffn] or not isinstance(point, fx.Node) or point is ffn or not isinstance(source, fx.Node):
        return None
    if dtype(point) != dtype(source) or dtype(total) != dtype(point) or not same_shape(point, total):
        return None
    return _Added(ffn, point, total) if value(point) is not None and shape(point) == shape(source) else None
