"""The op vocabulary and the residual stream of a traced graph. Knows torch.fx, and no model and no compiler."""

from fxfuse.graph.branch import Branch, Kind, Term
from fxfuse.graph.ffn import FFN, Projection
from fxfuse.graph.scale import Scale
from fxfuse.graph.stream import ResidualStream, find_streams
from fxfuse.graph.sums import Sum

__all__ = ["FFN", "Branch", "Kind", "Projection", "ResidualStream", "Scale", "Sum", "Term", "find_streams"]
