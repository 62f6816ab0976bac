"""Normal form: what every pass begins with, whoever traced the graph. Exact.

Modules and checkpoints are inlined, dialects translated, and what the graph does by writing to memory is written as
values.
"""

from __future__ import annotations

from torch import fx

from fxfuse.passes.normalise.checkpoints import inline_checkpoints
from fxfuse.passes.normalise.collectives import join_waits
from fxfuse.passes.normalise.dialect import translate
from fxfuse.passes.normalise.functional import make_functional
from fxfuse.passes.normalise.inline import inline
from fxfuse.passes.normalise.shards import localise


def normalise(gm: fx.GraphModule) -> list[tuple[str, str]]:
    """Bring ``gm`` into the form that the recogniser reads; by node or module, what was done to it."""
    return [
        *((name, "inlined, to be recomputed") for name in inline_checkpoints(gm)),
        *((name, "inlined") for name in inline(gm)),
        *((name, "written on local tensors") for name in localise(gm.graph)),
        *((name, "made one with its wait") for name in join_waits(gm.graph)),
        *((name, "translated") for name in translate(gm.graph)),
        *((name, "made functional") for name in make_functional(gm.graph)),
    ]
