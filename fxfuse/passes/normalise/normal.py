"""Normal form: what every pass begins with, whoever traced the graph. Exact.

Modules and checkpoints are inlined, dialects translated, and what the graph does by writing to memory is written as
values.
"""

from __future__ import annotations

from torch import fx

from fxfuse.passes.base import Edit
from fxfuse.passes.normalise.checkpoints import inline_checkpoints
from fxfuse.passes.normalise.dialect import translate
from fxfuse.passes.normalise.functional import make_functional
from fxfuse.passes.normalise.inline import inline
from fxfuse.stream.finder import ResidualStream, find_streams


def normalise(gm: fx.GraphModule) -> list[Edit]:
    """Bring ``gm`` into the form that the recogniser reads; what was done, by node or module name."""
    return [
        *(Edit((name,), "inlined, to be recomputed") for name in inline_checkpoints(gm)),
        *(Edit((name,), "inlined") for name in inline(gm)),
        *(Edit((name,), "translated") for name in translate(gm.graph)),
        *(Edit((name,), "made functional") for name in make_functional(gm.graph)),
    ]


def normal_streams(gm: fx.GraphModule) -> tuple[ResidualStream, ...]:
    """The streams of ``gm``, which is brought into normal form first: what a pass that is called alone begins with."""
    normalise(gm)
    return find_streams(gm)
