"""Inductor, called as a function and extended by a pass. Seen on torch 2.13.0.

``torch.compile(backend="inductor")`` would trace anew the graph that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
from torch._inductor.custom_graph_pass import get_hash_for_files as get_hash_for_files

# A pass that is no CustomGraphPass has no uuid, and inductor's caches are bypassed, or worse, not.


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Tensor], options: Mapping[str, object] | None = None
) -> Callable[..., object]:
    """Compile a graph of torch functions or aten ops; ``options`` are those of torch.compile for inductor."""
    from torch._inductor.compile_fx import compile_fx  # only now: it imports much

    compiled = compile_fx(gm, inputs, config_patches=dict(options) if options else None)
    assert callable(compiled)
    return compiled


def options_of_mode(mode: str) -> dict[str, object]:
    """What a ``mode`` of torch.compile means in options; torch.compile itself takes the one or the other."""
    return dict(torch._inductor.list_mode_options(mode))


def is_set(option: str) -> bool:
    """Whether the user has set an option for the whole process, that is None otherwise."""
    return getattr(torch._inductor.config, option) is not None
